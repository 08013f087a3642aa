"""Figures of one stage over its steps: metrics.jsonl always, Weights & Biases when asked. Rank 0 only.

The only file that imports wandb. A W&B that does not work never stops training.
"""

from __future__ import annotations

import json
import netrc
import os
import shutil
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray_pipeline.errors import UserError
from ray_pipeline.records.artifacts import atomic_path
from ray_pipeline.records.integrity import unsealed
from ray_pipeline.records.progress import read_progress
from ray_pipeline.settings.run_folder import METRICS_FILE, PROGRESS_FILE, SAMPLES_FILE
from ray_pipeline.settings.schema import PipelineFields

CHECK = "crc32"  # key of a line's own checksum
EVALUATED = "eval/step"  # in W&B alone: the step of the last evaluation


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The stage's logged lines, oldest first, without those that are damaged or were torn by a kill."""
    return _scan_metrics(folder)[0]


def _scan_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole lines, and the numbers of damaged ones. A last line that does not end was torn: none of the two."""
    path = folder / METRICS_FILE
    if not path.exists():
        return [], []
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        line = _whole_line(text)
        if line is None:
            damaged.append(number)
        else:
            lines.append(line)
    return lines, damaged


def _line_text(line: Mapping[str, Any]) -> str:
    """A line of the file, with its own checksum behind the figures."""
    return json.dumps({**line, CHECK: zlib.crc32(json.dumps(line).encode())}) + "\n"


def _whole_line(text: bytes) -> dict[str, Any] | None:
    """The figures of a line; None where it is not as it was written. Lines of older versions have no checksum."""
    try:
        line = json.loads(text.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    check = line.pop(CHECK, None)
    return line if check in (None, zlib.crc32(json.dumps(line).encode())) else None


def read_samples(folder: Path) -> list[Any]:
    """Questions and the model's answers, as the stage left them.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SAMPLES_FILE
    if not path.exists():
        return []
    text = path.read_bytes()
    if text.lstrip().startswith(b"["):  # of an older version
        return list(json.loads(text.decode("utf-8")))
    found = unsealed(text).get("samples")
    if not isinstance(found, list):
        raise ValueError("it lists no samples")
    return found


def damaged_files(folder: Path) -> list[str]:
    """What is damaged of the files a stage wrote for people to read: nothing is trained on them."""
    out = []
    if numbers := _scan_metrics(folder)[1]:
        shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
        out.append(f"{folder / METRICS_FILE}: damaged in line {shown}, left out")
    try:
        read_samples(folder)
    except ValueError as error:
        out.append(f"{folder / SAMPLES_FILE}: damaged ({error}), not shown")
    progress = folder / PROGRESS_FILE
    if progress.exists() and read_progress(folder) is None:
        out.append(f"{progress}: damaged, not shown")
    return out


def can_log_in(env: Mapping[str, str], home: Path) -> bool:
    """Whether there is a key for W&B: in the environment, or where `wandb login` leaves it."""
    if env.get("WANDB_API_KEY"):
        return True
    host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in [Path(env["NETRC"])] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host) is not None:
                return True
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
    return False


def _is_evaluation(figures: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in figures)


class Tracker:
    """Logs to `folder/metrics.jsonl` and to one W&B run whose id stays the same over resumes.

    On resume the lines past `resume_step` are dropped, because those steps are taken again. W&B is brought to the same
    state: a process that is killed takes with it what W&B had not flushed (seen: all of a short offline run), so the
    lines that are kept are sent again where W&B does not have them, and its `step` metric never goes back.

    Args:
        evaluated: whether what was logged of the evaluation at `resume_step` stays; else it is taken again.
    Raises:
        UserError: on resume, a line of the file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        config: PipelineFields,
        *,
        wandb_id: str,
        group: str,
        resume_step: int = 0,
        evaluated: bool = True,
    ):
        self.folder, self.stage = folder, stage
        lines, damaged = _scan_metrics(folder)
        if damaged and resume_step:
            raise UserError(
                f"{folder / METRICS_FILE}: damaged in line {damaged[0]}. Delete that line (sed -i {damaged[0]}d "
                f"{folder / METRICS_FILE}) and resume: its figures are gone, training goes on as before."
            )
        kept = [line for line in lines if line["step"] <= resume_step]
        kept = [line for line in kept if evaluated or line["step"] < resume_step or not _is_evaluation(line)]
        with atomic_path(folder / METRICS_FILE) as aside:
            aside.write_text("".join(map(_line_text, kept)), encoding="utf-8")
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._run: Any = None
        # The last steps that W&B had figures of training and of an evaluation from, before this process.
        self._received = {"step": 0, EVALUATED: 0}
        if config.tracking.wandb:
            self._start_wandb(config, wandb_id, group)
            for line in kept:
                self._send(line["step"], {k: v for k, v in line.items() if k not in ("stage", "step", "time")})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures at `step` (optimizer steps taken)."""
        line = {"stage": self.stage, "step": step, "time": round(time.time(), 3), **figures}
        self._file.write(_line_text(line))
        self._file.flush()
        self._send(step, figures)

    def finish(self, summary: Mapping[str, float]) -> None:
        """Close both; `summary` becomes the W&B run's summary."""

        def close(run: Any) -> None:
            run.summary.update(dict(summary))
            run.finish()

        self._guard(close)
        self._file.close()

    def _send(self, step: int, figures: Mapping[str, float]) -> None:
        evaluation = {EVALUATED: step} if _is_evaluation(figures) else {}
        if step > self._received[EVALUATED if evaluation else "step"]:
            self._guard(lambda run: run.log({"step": step, **figures, **evaluation}))

    def _start_wandb(self, config: PipelineFields, wandb_id: str, group: str) -> None:
        import wandb

        online = can_log_in(os.environ, Path(os.path.expanduser("~")))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        if mode == "offline":
            # One file holds the whole history: what an earlier process left is a part of what is sent again.
            for earlier in self.folder.glob("wandb/offline-run-*"):
                if not list(earlier.glob("*.synced")):
                    shutil.rmtree(earlier)
        try:
            self._run = wandb.init(
                project=config.tracking.project, entity=config.tracking.entity, id=wandb_id, resume="allow",
                name=f"{group}-{self.stage}", group=group, job_type=self.stage, dir=str(self.folder), mode=mode,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )  # fmt: skip
            # Offline, `_step` starts again at every resume; our own step is the axis.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            received = int(self._run.summary.get("step") or 0)
            # A run that was begun before evaluations had their own count had one with every step.
            self._received = {"step": received, EVALUATED: int(self._run.summary.get(EVALUATED, received))}
            if not received:
                self._run.summary[EVALUATED] = 0
        except Exception as error:  # noqa: BLE001  whatever ends W&B, it does not end training
            self._give_up(error)

    def _guard(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001  its own process may die, and then these are errors of sockets
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(
            f"{self.stage}: Weights & Biases stopped ({type(error).__name__}: {error}); "
            f"training goes on, figures are in {self.folder / METRICS_FILE}",
            file=sys.stderr,
            flush=True,
        )
