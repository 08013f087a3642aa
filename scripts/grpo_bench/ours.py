"""This project's GRPO stage on the task, step by step on demand: the stage's own source, engine and objective."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.generate.decode import Completion
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.grpo import Grpo
from ray_pipeline.objectives.sampler_gap import SamplerGap
from ray_pipeline.rollouts.packed_rows import pack_completions
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.training.grpo.reference import logprobs_at
from ray_pipeline.training.grpo.setup import objective_of, rollout_source
from ray_pipeline.training.rank import Rank, start_rank
from ray_pipeline.training.sampling_model import sampling_model
from scripts.grpo_bench.task import FIRST_STEP, LR, REWARDS, Task
from scripts.model_bench.competitors import build

MICRO_BATCH = 8  # rows of seq_len per forward pass


def run(task: Task, folder: Path, wait: Callable[[], None], report: Callable[[dict[str, float]], None]) -> None:
    """First compare with TRL on FIRST_STEP, then take a step after each `wait()` and give its seconds to `report`."""
    rank, state = _rank(task, folder), build(task.model).state_dict()
    settings = rank.config.grpo
    gap = SamplerGap()
    objective = objective_of(settings, gap)
    wait()
    report(compare(task, rank, objective, state, folder))
    engine = rank.trainer_engine(task.model, state)
    with rollout_source(rank, engine, sampling_model(rank, engine), state, gap) as source:
        for step in range(settings.steps):
            wait()
            started = time.perf_counter()
            batch = source.batch(step)
            if batch is not None:
                engine.train_step(batch, objective, LR)
            total, found = time.perf_counter() - started, source.metrics()
            rollouts, scoring = found["sampling_seconds"], found["scoring_seconds"]
            report({"seconds": total, "rollouts": rollouts, "scoring": scoring, "update": total - rollouts - scoring,
                    "tokens": found["completion_tokens"], "skipped_groups": found["skipped_groups"]})  # fmt: skip


def _rank(task: Task, folder: Path) -> Rank:
    config = PipelineFields.model_validate({
        "model": dataclasses.asdict(task.model),
        "layout": {"micro_batch": MICRO_BATCH},
        "data": {"seq_len": task.seq_len},
        "grpo": {
            "steps": 1000, "prompts_per_step": task.prompts, "group_size": task.group_size, "beta": task.beta,
            "max_new_tokens": task.max_new_tokens, "precision": task.precision, "rewards": REWARDS,
            "optimizer": {"lr": LR, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        },
    })  # fmt: skip
    place = folder / "ours"
    place.mkdir(exist_ok=True)
    return start_rank({
        "config": config.model_dump(mode="json") | {"model": dataclasses.asdict(task.model)}, "stage": "grpo",
        "folder": str(place), "upstream": {"data_prep": str(folder)},
    })  # fmt: skip


def compare(task: Task, rank: Rank, objective: Grpo, state: dict[str, Any], folder: Path) -> dict[str, float]:
    """Loss and gradient norm of a step on TRL's first batch, relative to what TRL had there."""
    first = torch.load(folder / FIRST_STEP)
    tokenizer = load_tokenizer(folder / "tokenizer")
    completions = []
    for i in range(len(first["answers"])):
        prompt = first["prompt_ids"][i][first["prompt_mask"][i].bool()].tolist()
        answer = first["completion_ids"][i][first["completion_mask"][i].bool()].tolist()
        completions.append(Completion(prompt, answer, [0.0] * len(answer), finished=True))
    batch = pack_completions(completions, first["advantages"], task.seq_len, tokenizer.pad_id)
    reference: Engine = rank.engine(task.model, initial=state)
    batch.extras.ref_logprobs = reference.per_token(batch, logprobs_at(1.0))
    batch.extras.sampler_logprobs = None
    stats = rank.trainer_engine(task.model, state).train_step(batch, objective, LR)
    return {
        "loss": abs(stats.loss - first["loss"]),  # absolute: it is near zero, as advantages of a group sum to zero
        "norm": abs(stats.grad_norm - first["grad_norm"]) / first["grad_norm"],
    }
