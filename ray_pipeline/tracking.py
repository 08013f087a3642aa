"""Figures of one stage over its steps: metrics.jsonl always, Weights & Biases when asked. Rank 0 only.

The only file that imports wandb. A W&B that does not work never stops training.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.artifacts import atomic_path
from ray_pipeline.config import PipelineFields

METRICS_FILE = "metrics.jsonl"
EVALUATED = "eval/step"  # in W&B alone: the step of the last evaluation


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The stage's logged lines, oldest first; a line torn by a kill is left out."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):  # other line ends may stand inside a line
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _is_evaluation(figures: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in figures)


class Tracker:
    """Logs to `folder/metrics.jsonl` and to one W&B run whose id stays the same over resumes.

    On resume the lines past `resume_step` are dropped, because those steps are taken again. W&B is brought to the same
    state: a process that is killed takes with it what W&B had not flushed (seen: all of a short offline run), so the
    lines that are kept are sent again where W&B does not have them, and its `step` metric never goes back.

    Args:
        evaluated: whether what was logged of the evaluation at `resume_step` stays; else it is taken again.
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
        kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        kept = [line for line in kept if evaluated or line["step"] < resume_step or not _is_evaluation(line)]
        with atomic_path(folder / METRICS_FILE) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
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
        self._file.write(json.dumps(line) + "\n")
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
        from wandb.errors import Error

        online = bool(os.environ.get("WANDB_API_KEY"))
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
        except Error as error:
            self._give_up(error)

    def _guard(self, action: Any) -> None:
        if self._run is None:
            return
        from wandb.errors import Error

        try:
            action(self._run)
        except Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(
            f"{self.stage}: Weights & Biases stopped ({type(error).__name__}: {error}); "
            f"training goes on, figures are in {self.folder / METRICS_FILE}",
            file=sys.stderr,
            flush=True,
        )
