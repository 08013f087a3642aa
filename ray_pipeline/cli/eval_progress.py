"""How far an evaluation is: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console

from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.progress_lines import ProgressLines


class AskProgress:
    """`with AskProgress("model") as progress:`, then `start` for each task and `add` after each batch."""

    def __init__(self, model: str, console: Console | None = None):
        self.model, self.lines = model, ProgressLines(console or Console(stderr=True), transient=True)
        self._task, self._total, self._done, self._tokens = "", 0, 0, 0
        self._started = time.monotonic()

    def __enter__(self) -> AskProgress:
        self.lines.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.lines.__exit__(*exc)

    def say(self, text: str) -> None:
        """What takes a while and has no count."""
        self.lines.start(self.model, text)

    def start(self, task: str, total: int) -> None:
        """A task begins; `total` answers, 0 for unknown."""
        self._task, self._total, self._done, self._tokens = task, total, 0, 0
        self._started = time.monotonic()
        self.lines.start(self.model, task, total or None)

    def add(self, answers: int, tokens: int) -> None:
        """A batch is done."""
        self._done += answers
        self._tokens += tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else f"{self._done / seconds:,.1f} questions/s"
        left = seconds / self._done * (self._total - self._done) if self._done else 0.0
        until = f"/{self._total}, {seconds_text(left)} left" if self._total else ""
        self.lines.show(self.model, f"{self._task} {self._done}{until}, {rate}", self._done, self._total or None)
