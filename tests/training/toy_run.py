"""A training stage small enough to be started many times: random tokens, a tiny model, and faults on demand."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.training.rank import Rank, start_rank
from ray_pipeline.training.trainer import Trainer
from tests.engine.test_parity import CONFIG, make_batch


def arguments(folder: Path, *, layout: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """What `train` is given, as launchers pass it on; `fault` is {kind, rank, step, where}, `pace` seconds a step."""
    fault, pace = settings.pop("fault", None), settings.pop("pace", 0.0)
    guards = settings.pop("guards", {})
    pretrain = {
        "steps": 8, "batch_size": 8, "eval_every": 4, "checkpoint_every": 2, "log_every": 2,
        "optimizer": {"warmup_steps": 0, "lr": 1e-2},
    } | settings  # fmt: skip
    config = PipelineFields.model_validate(
        {"model": asdict(CONFIG), "layout": {"micro_batch": 2, **(layout or {})}, "pretrain": pretrain,
         "tracking": {"wandb": False}, "data": {"seq_len": 16}, "guards": guards}
    )  # fmt: skip
    stage = folder / "toy" / "pretrain-0"
    return {
        "config": config.model_dump(mode="json"), "stage": "pretrain", "folder": str(stage),
        "upstream": {"data_prep": str(folder / "data")}, "fault": fault, "pace": pace,
    }  # fmt: skip


class Batches:
    """`make_batch` of the step; on the way there the fault, if this is its rank and step."""

    def __init__(self, rank: Rank, engine: Engine, fault: dict[str, Any] | None, pace: float):
        self.rank, self.engine, self.fault, self.pace = rank, engine, fault, pace

    def batch(self, step: int) -> Batch:
        time.sleep(self.pace)
        self.step = step
        strike(self.fault, self.rank, step, "batch")
        if self.fault is not None and step == self.fault.get("later"):
            raise ZeroDivisionError("a bug")
        if self.fault is not None and self.fault["kind"] == "dead expert" and step >= self.fault["step"]:
            starve(self.engine, expert=0)
        return make_batch(step)

    def metrics(self) -> dict[str, float]:
        return {}


class Disturbed(CrossEntropy):
    """Cross-entropy that one batch makes a thousand times as large, or no number, if that is the fault."""

    def __init__(self, batches: Batches):
        super().__init__(0.3)
        self.batches = batches

    def __call__(self, *args: Any) -> torch.Tensor:
        values, fault = super().__call__(*args), self.batches.fault or {}
        factor = {"spike": 1000.0, "nan": float("nan")}.get(fault.get("kind", ""))
        return values if factor is None or self.batches.step != fault["step"] else values * factor


def starve(engine: Engine, expert: int) -> None:
    """Let no router choose this expert for the next step."""
    for name, tensor in engine.state().items():
        if name.endswith("e_score_correction_bias"):
            tensor[expert] = -100.0


def strike(fault: dict[str, Any] | None, rank: Rank, step: int, where: str) -> None:
    """Hang, die or fail here, if it is said so."""
    if fault is None or (fault["rank"], fault["step"], fault.get("where", "batch")) != (rank.mesh.rank, step, where):
        return
    if fault["kind"] in ("once", "stop once"):
        mark = rank.folder / "struck"
        if mark.exists():
            return
        mark.touch()
    if fault["kind"] == "hang":
        time.sleep(3600)
    if fault["kind"] in ("stop", "stop once"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault["kind"] in ("kill", "once"):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["kind"] == "exit":
        os._exit(7)
    raise ZeroDivisionError("a bug")


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: the real engine, trainer and checkpoints."""
    rank = start_rank(arguments)
    torch.set_num_threads(1)
    engine = rank.trainer_engine(rank.config.model, None)
    batches = Batches(rank, engine, arguments["fault"], arguments["pace"])
    objective = Disturbed(batches)
    started: list[int] = []
    trainer = Trainer(rank, engine, objective)

    def evaluate() -> dict[str, float]:
        strike(arguments["fault"], rank, 0, "evaluate")
        return {"validation_loss": engine.evaluate(make_batch(1000), objective).loss}

    resume = trainer._resume
    trainer._resume = lambda: started.append(resume()) or started[-1]  # type: ignore[method-assign,func-returns-value]
    figures = trainer.fit(batches, evaluate)
    return figures | {"started": started[0], "digest": weights_digest(engine.full_state()), "world": rank.mesh.world}
