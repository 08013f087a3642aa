"""Where a stage stands: rank 0 writes progress.json, the driver reads it and shows one line per stage. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ray_pipeline.artifacts import write_sealed
from ray_pipeline.integrity import unsealed
from ray_pipeline.rank_errors import ERRORS, frozen_reports

PROGRESS_FILE = "progress.json"
WRITE_EVERY = 0.3  # seconds between writes of progress.json
PLAIN_EVERY = 10.0  # seconds between lines of one stage when the output is not a terminal
BAR_WIDTH = 16  # characters


class Progress:
    """Written by rank 0 (or by a stage without ranks), into the stage's folder."""

    def __init__(self, folder: Path, stage: str, steps: int, *, note: str | None = None):
        self.path, self._written, self._first = folder / PROGRESS_FILE, 0.0, (0, time.monotonic())
        self.state: dict[str, Any] = {
            "stage": stage, "step": 0, "steps": steps, "loss": None, "layer_losses": {}, "tokens_per_second": None,
            "seconds_left": None, "phase": "starting", "phase_done": 0, "phase_total": 0, "phase_unit": "",
            "phase_rate": None, "note": note,
        }  # fmt: skip
        self._stepped = False
        self._phase_first = (0, time.monotonic())
        self._write(now=True)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        layer_losses: Mapping[str, float] | None = None,
    ) -> None:
        """After optimizer steps: `step` of `steps` are done. `layer_losses`: those beside the main one, by name."""
        if not self._stepped or step < self._first[0]:
            self._stepped, self._first = True, (step, time.monotonic())
        done, seconds = step - self._first[0], time.monotonic() - self._first[1]
        left = seconds / done * (self.state["steps"] - step) if done > 0 else None
        self.state.update(
            step=step, loss=loss, tokens_per_second=tokens_per_second, seconds_left=left,
            layer_losses=dict(layer_losses or {}), phase="training", phase_done=0, phase_total=0,
        )  # fmt: skip
        self._write(now=step >= self.state["steps"])

    def phase(self, name: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        """What goes on besides optimizer steps: "evaluating", "sampling", "teacher answers" (`done` of `total`).

        Args:
            unit: "bytes" shows sizes, with the rate and the time left.
        """
        changed = name != self.state["phase"]
        if changed:
            self._phase_first = (done, time.monotonic())
        first, started = self._phase_first
        seconds = time.monotonic() - started
        rate = (done - first) / seconds if unit and done > first and seconds > 1 else None
        self.state.update(phase=name, phase_done=done, phase_total=total, phase_unit=unit, phase_rate=rate)
        self._write(now=changed)

    def _write(self, *, now: bool) -> None:
        if now or time.monotonic() - self._written >= WRITE_EVERY:
            write_sealed(self.path, self.state | {"time": time.time()}, durable=False)
            self._written = time.monotonic()


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What the stage wrote last; None before it wrote anything, or where the file is damaged."""
    try:
        return unsealed((folder / PROGRESS_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def seconds_text(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress_text(state: Mapping[str, Any]) -> str:
    """`step 150/300  loss 1.931  5200 tokens/s  45 s left  evaluating`; only what is known."""
    parts = [f"step {state['step']}/{state['steps']}"] if state.get("steps") else []
    if state.get("loss") is not None:
        parts.append(f"loss {state['loss']:.4g}")
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in (state.get("layer_losses") or {}).items()]
    if state.get("tokens_per_second"):
        parts.append(f"{state['tokens_per_second']:,.0f} tokens/s")
    if state.get("seconds_left") is not None:
        parts.append(f"{seconds_text(state['seconds_left'])} left")
    if state.get("phase") and state["phase"] != "training":
        parts.append(_phase_text(state))
    if state.get("note"):
        parts.append(f"({state['note']})")
    return "  ".join(parts)


def size_text(size: float) -> str:
    """`640 kB`, `12.4 MB`, `1.2 GB`."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (0, "kB")) if size >= u)
    return f"{size / 1e3:.0f} kB" if name == "kB" else f"{size / unit:.1f} {name}"


def _phase_text(state: Mapping[str, Any]) -> str:
    """`conversations 200/300`, `reading and cleaning 12.0 MB of 500.0 MB  6.1 MB/s  1 min 20 s left`."""
    name, done, total, rate = (state.get(key) for key in ("phase", "phase_done", "phase_total", "phase_rate"))
    if not total:
        return str(name)
    if state.get("phase_unit") != "bytes":
        return f"{name} {done}/{total}"
    text = f"{name} {size_text(float(done or 0))} of {size_text(float(total))}"
    return f"{text}  {size_text(rate)}/s  {seconds_text((total - (done or 0)) / rate)} left" if rate else text


class Report(Protocol):
    """Told what goes on: the phase, how much is done, of how much (None: unknown), counted in which unit."""

    def __call__(self, phase: str, done: int, total: int | None, unit: str = "") -> None: ...


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
