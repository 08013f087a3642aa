"""Shows one line per stage while a run goes on: live on a terminal, throttled plain lines elsewhere. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ray_pipeline.launch.rank_errors import ERRORS, frozen_reports
from ray_pipeline.records.progress import progress_text, read_progress
from ray_pipeline.records.units import seconds_text

PLAIN_EVERY = 10.0  # seconds between lines of one stage when the output is not a terminal
BAR_WIDTH = 16  # characters


@dataclass
class _Line:
    """One stage on the screen."""

    folder: Path
    started: float | None = None
    finished: str | None = None
    printed: float = float("-inf")
    frozen: set[float] = field(default_factory=set)
    shown: str = ""


class ProgressView:
    """One line per stage: live on a terminal, throttled plain lines elsewhere. `with ProgressView(...) as view:`"""

    def __init__(self, console: Console, stages: Mapping[str, Path], *, plain_every: float = PLAIN_EVERY):
        self.console, self.plain_every = console, plain_every
        self.lines = {name: _Line(folder) for name, folder in stages.items()}
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
            self._live.stop()

    def start(self, stage: str) -> None:
        """The stage began."""
        self.lines[stage].started = time.monotonic()
        if self._live is None:
            self._print(f"{stage}: started")

    def finish(self, stage: str, outcome: str) -> None:
        """The stage ended; `outcome` is what its line says from now on."""
        self.lines[stage].finished = outcome
        if self._live is None:
            self._print(f"{stage}: {outcome}")

    def refresh(self) -> None:
        """Read the stages' files and show what changed. Call often; it throttles itself."""
        self._tell_frozen()
        if self._live is not None:
            self._live.update(self._screen())
            return
        for name, line in self.lines.items():
            if line.started is None or line.finished is not None:
                continue
            text = self._running(line)
            if text and text != line.shown and time.monotonic() - line.printed >= self.plain_every:
                line.shown, line.printed = text, time.monotonic()
                self._print(f"{name}: {text}")

    def _tell_frozen(self) -> None:
        """Ranks that froze, at once: the stage may go on without them, or wait for their end."""
        for name, line in self.lines.items():
            for page in frozen_reports(line.folder) if line.started is not None and line.finished is None else ():
                if page["time"] not in line.frozen:
                    line.frozen.add(page["time"])
                    self._print(f"{name}: {page['text']}. It is ended; the stacks are in {line.folder / ERRORS}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _running(self, line: _Line) -> str:
        state = read_progress(line.folder)
        return "" if state is None else progress_text(state)

    def _screen(self) -> Text:
        width = max(map(len, self.lines), default=0)
        screen = Text()
        for index, (name, line) in enumerate(self.lines.items()):
            screen.append("\n" if index else "")
            screen.append(f"{name:<{width}}  ", style="bold" if line.started and not line.finished else "dim")
            if line.finished is not None:
                screen.append(line.finished)
            elif line.started is None:
                screen.append("waiting", style="dim")
            else:
                self._append_running(screen, line)
        return screen

    def _append_running(self, screen: Text, line: _Line) -> None:
        assert line.started is not None
        state = read_progress(line.folder) or {}
        if steps := state.get("steps"):
            filled = round(BAR_WIDTH * min(1.0, state["step"] / steps))
            screen.append("━" * filled, style="green")
            screen.append("━" * (BAR_WIDTH - filled) + " ", style="dim")
        text = progress_text(state) if state else "starting"
        screen.append(f"{text}  ({seconds_text(time.monotonic() - line.started)})")
