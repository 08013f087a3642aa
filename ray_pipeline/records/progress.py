"""What ranks and the driver tell each other in files: where a stage stands, and that a run is to stop. No torch.

Rank 0 writes progress.json, the driver reads it; the budget writes stop.json, ranks read it between steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.records.integrity import unsealed
from ray_pipeline.records.units import bytes_text, seconds_text
from ray_pipeline.settings.run_folder import PROGRESS_FILE, STOP_FILE

WRITE_EVERY = 0.3  # seconds between writes of progress.json


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


def _phase_text(state: Mapping[str, Any]) -> str:
    """`conversations 200/300`, `reading and cleaning 12 MB of 500 MB  6.1 MB/s  1 min 20 s left`."""
    name, done, total, rate = (state.get(key) for key in ("phase", "phase_done", "phase_total", "phase_rate"))
    if not total:
        return str(name)
    if state.get("phase_unit") != "bytes":
        return f"{name} {done}/{total}"
    text = f"{name} {bytes_text(float(done or 0))} of {bytes_text(float(total))}"
    return f"{text}  {bytes_text(rate)}/s  {seconds_text((total - (done or 0)) / rate)} left" if rate else text


class Report(Protocol):
    """Told what goes on: the phase, how much is done, of how much (None: unknown), counted in which unit."""

    def __call__(self, phase: str, done: int, total: int | None, unit: str = "") -> None: ...


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Training saves a checkpoint where figures are logged next, and ends; a stage that has not begun does not."""
    write_sealed(run_dir / STOP_FILE, {"reason": reason})


def stop_reason(run_dir: Path) -> str | None:
    """Why the run is to stop; None where it is not."""
    try:
        return str(unsealed((run_dir / STOP_FILE).read_bytes())["reason"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return "its stop file cannot be read"


def go_on(run_dir: Path) -> None:
    """Forget an earlier request; a run that is started again is meant to run."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)
