"""Shows one line per stage while a run goes on, from the files that the stages write. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from ray_pipeline.launch.rank_errors import ERRORS, frozen_reports
from ray_pipeline.records.event_log import EventFiles
from ray_pipeline.records.progress import progress_text, read_progress
from ray_pipeline.report.progress_lines import PLAIN_EVERY, ProgressLines


class ProgressView:
    """One line per stage: live on a terminal, throttled plain lines elsewhere. `with ProgressView(...) as view:`"""

    def __init__(self, console: Console, stages: Mapping[str, Path], *, plain_every: float = PLAIN_EVERY):
        self.lines = ProgressLines(console, plain_every=plain_every)
        self.folders = dict(stages)
        self._running: set[str] = set()
        self._events = {stage: EventFiles(folder) for stage, folder in self.folders.items()}
        self._warned: set[tuple[str, str]] = set()  # stage and text: ranks often say the same
        self._told: set[tuple[str, float]] = set()  # frozen ranks: stage and time of the report

    def __enter__(self) -> ProgressView:
        self.lines.__enter__()
        for stage in self.folders:
            self.lines.wait(stage)
        return self

    def __exit__(self, *exc: object) -> None:
        self.lines.__exit__(*exc)

    def start(self, stage: str) -> None:
        """The stage began."""
        self._running.add(stage)
        self.lines.start(stage, "started")

    def finish(self, stage: str, outcome: str) -> None:
        """The stage ended; `outcome` is what its line says from now on."""
        self._tell_warnings(stage)
        self._running.discard(stage)
        self.lines.finish(stage, outcome)

    def say(self, text: str) -> None:
        """A line above the stages'."""
        self.lines.say(text)

    def refresh(self) -> None:
        """Read the stages' files and show what changed. Call often; it throttles itself."""
        for stage in self.folders:
            if stage in self._running:
                self._tell_frozen(stage)
                self._tell_warnings(stage)
                state = read_progress(self.folders[stage])
                if state is not None and (text := progress_text(state)):
                    self.lines.show(stage, text, state["step"], state["steps"] or None)

    def _tell_warnings(self, stage: str) -> None:
        """What the stage's processes logged as warnings and errors."""
        for event in self._events[stage].read():
            text = str(event["message"])
            if event["level"] in ("warning", "error", "critical") and (stage, text) not in self._warned:
                self._warned.add((stage, text))
                self.lines.say(text if text.startswith(stage) else f"{stage}: {text}")

    def _tell_frozen(self, stage: str) -> None:
        """Ranks that froze, at once: the stage may go on without them, or wait for their end."""
        for page in frozen_reports(self.folders[stage]):
            if (stage, page["time"]) not in self._told:
                self._told.add((stage, page["time"]))
                errors = self.folders[stage] / ERRORS
                self.lines.say(f"{stage}: {page['text']}. It is ended; the stacks are in {errors}")
