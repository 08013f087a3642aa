"""Lines that say how far something is: bars on a terminal, plain lines now and then elsewhere. Reads no files."""

from __future__ import annotations

import time

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from ray_pipeline.records.units import seconds_text

PLAIN_EVERY = 10.0  # seconds between lines of one name when the output is not a terminal
BAR_WIDTH = 16  # characters


class _Bar(ProgressColumn):
    """A bar for what is running; it pulses where the end is unknown."""

    def render(self, task: Task) -> RenderableType:
        running = task.started and task.stop_time is None
        return ProgressBar(total=task.total, completed=task.completed, width=BAR_WIDTH) if running else Text("")


class _Elapsed(ProgressColumn):
    """Time since the start of what is running."""

    def render(self, task: Task) -> RenderableType:
        if task.start_time is None or task.stop_time is not None:
            return Text("")
        return Text(seconds_text(task.get_time() - task.start_time), style="dim")


class ProgressLines:
    """One line for each name. `with ProgressLines(console) as lines:`, then `start`, `show` and `finish`.

    Args:
        plain_every: least seconds between two lines of one name where the console is no terminal.
        transient: whether the lines vanish from the terminal at the end.
    """

    def __init__(self, console: Console, *, plain_every: float = PLAIN_EVERY, transient: bool = False):
        self.console, self.plain_every = console, plain_every
        self._bars = Progress(
            TextColumn("{task.description}"), _Bar(), _Elapsed(), TextColumn("{task.fields[text]}", markup=False),
            console=console, transient=transient, disable=not console.is_terminal, get_time=time.monotonic,
        )  # fmt: skip
        self._ids: dict[str, TaskID] = {}
        self._shown: dict[str, tuple[str, float]] = {}  # the last plain line of a name, and when it was printed

    def __enter__(self) -> ProgressLines:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._bars.disable:  # else rich before 14 would print an empty line
            self._bars.stop()

    def wait(self, name: str) -> None:
        """A line on the terminal for what has yet to start."""
        self._ids[name] = self._bars.add_task(f"[dim]{escape(name)}", start=False, total=None, text="waiting")

    def start(self, name: str, text: str, total: float | None = None) -> None:
        """It begins, or begins again; `total` is None where its end is unknown."""
        if name in self._shown:
            self._bars.remove_task(self._ids.pop(name))
        if name not in self._ids:
            self.wait(name)
        self._bars.reset(self._ids[name], total=total, description=f"[bold]{escape(name)}", text=text)
        self._shown[name] = (text, float("-inf"))
        self._plain(f"{name}: {text}")

    def show(self, name: str, text: str, done: float = 0, total: float | None = None, *, now: bool = False) -> None:
        """Where it stands. Call often: plain lines are throttled, except with `now`."""
        self._bars.update(self._ids[name], completed=done, total=total, text=text)
        last, printed = self._shown[name]
        if now or (text != last and time.monotonic() - printed >= self.plain_every):
            self._shown[name] = (text, time.monotonic())
            self._plain(f"{name}: {text}")

    def finish(self, name: str, text: str) -> None:
        """It ended; `text` is what its line says from now on."""
        self._bars.stop_task(self._ids[name])
        self._bars.update(self._ids[name], description=f"[dim]{escape(name)}", text=text)
        self._plain(f"{name}: {text}")

    def say(self, text: str) -> None:
        """One line at once, above the others on a terminal."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _plain(self, text: str) -> None:
        if self._bars.disable:
            self.say(text)
