"""DISTILLATION on a run folder made in a second: an untrained teacher, and what each test asks of its student."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from ray_pipeline.dag.ledger import RunFile
from ray_pipeline.launch.launchers import ProcessLauncher
from ray_pipeline.records.artifacts import load_model
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.stages import distillation
from tests.cli.made_run import SEQ_LEN, TOY, make_run

STAGE = "distillation"
MODEL = replace(TOY, initializer_range=0.2)  # so that an untrained model prefers some tokens to others


def teacher_run(folder: Path, toy: ModelConfig = MODEL) -> Path:
    """A run folder whose GRPO is finished."""
    return make_run(folder, models=("grpo",), toy=toy)


def stage_dir(run_dir: Path, stage: str) -> Path:
    """The folder of a finished stage."""
    return run_dir / RunFile(run_dir).stages[stage]["folder"]


def settings_of(run_dir: Path, *, layout: dict[str, Any] | None = None, **settings: Any) -> PipelineFields:
    """Three steps of a student of one layer, unless the settings of DISTILLATION say otherwise."""
    chosen = {
        "steps": 3, "batch_size": 4, "eval_every": 10, "checkpoint_every": 1, "log_every": 1, "teacher_answers": 0,
        "prompts_per_step": 3, "student": {"num_hidden_layers": 1},
        # AdamW would turn the rounding of a gradient near zero into a whole step.
        "optimizer": {"name": "sgd", "schedule": "constant", "warmup_steps": 0, "lr": 0.5},
    } | settings  # fmt: skip
    return PipelineFields.model_validate(
        {
            "model": asdict(MODEL), "layout": {"micro_batch": 2, **(layout or {})}, "distillation": chosen,
            "data": {"seq_len": SEQ_LEN}, "tracking": {"wandb": False}, "run_name": run_dir.name,
            "evaluation": {"questions": 1, "max_new_tokens": 6},
        }
    )  # fmt: skip


def arguments(run_dir: Path, name: str = "out", **settings: Any) -> dict[str, Any]:
    """What launchers pass to `distillation.train`."""
    config = settings_of(run_dir, **settings)
    stages = RunFile(run_dir).stages
    return {
        "config": config.model_dump(mode="json"), "stage": STAGE, "folder": str(run_dir / name),
        "upstream": {stage: str(run_dir / entry["folder"]) for stage, entry in stages.items()},
    }  # fmt: skip


def distil(run_dir: Path, name: str = "out", *, ranks: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    """Train the student; its weights."""
    job = arguments(run_dir, name, **settings)
    if ranks == 1:
        distillation.train(job)
    else:
        ProcessLauncher(ranks).run(STAGE, distillation.train, job)
    return load_model(run_dir / name / "model").state_dict()


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Between any two weights of the same name."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
