"""How far an evaluation is: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ray_pipeline.dag.progress_view import PLAIN_EVERY
from ray_pipeline.records.units import seconds_text


class AskProgress:
    """`with AskProgress("model") as progress:`, then `start` for each task and `add` after each batch."""

    def __init__(self, model: str, console: Console | None = None):
        self.model, self.console = model, console or Console(stderr=True)
        columns = (
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self._task, self._total, self._done, self._tokens = "", 0, 0, 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> AskProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """One line, of what takes a while and has no count."""
        if self.bar is None:
            self.console.print(f"{self.model}: {text}", markup=False, highlight=False)

    def start(self, task: str, total: int) -> None:
        """A task begins; `total` answers, 0 for unknown."""
        self._task, self._total, self._done, self._tokens = task, total, 0, 0
        self._started = self._printed = time.monotonic()
        if self.bar is not None:
            for known in self.bar.task_ids:
                self.bar.remove_task(known)
            self.bar.add_task(f"{self.model}  {task}", total=total or None, rate="")

    def add(self, answers: int, tokens: int) -> None:
        """A batch is done."""
        self._done += answers
        self._tokens += tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else f"{self._done / seconds:,.1f} questions/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self._done, rate=rate)
        elif time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            left = seconds / self._done * (self._total - self._done) if self._done else 0.0
            until = f"/{self._total}, {seconds_text(left)} left" if self._total else ""
            self.console.print(f"{self.model}: {self._task} {self._done}{until}, {rate}", markup=False, highlight=False)
