"""A GRPO stage small enough to be started many times: digits as questions, a tiny model with random weights."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.objectives.sampler_gap import SamplerGap
from ray_pipeline.records.artifacts import save_model, weights_digest
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.training.finish import read_input
from ray_pipeline.training.grpo.rollout_source import RolloutSource
from ray_pipeline.training.grpo.setup import objective_of, rollout_source
from ray_pipeline.training.rank import Rank, start_rank
from ray_pipeline.training.sampling_model import sampling_model
from ray_pipeline.training.trainer import Trainer

VOCABULARY = 300
MODEL = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "steps": 4, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "eval_every": 100, "checkpoint_every": 2,
    "log_every": 1, "rewards": {"length": 1.0, "format": 0.1}, "optimizer": {"lr": 1e-2, "warmup_steps": 0},
}  # fmt: skip


def prepare(folder: Path, questions: int = 11) -> Path:
    """What the stages before GRPO leave: `data` with tokenizer and prompts, and the weights of `sft`."""
    data = folder / "data"
    save_trained(train_bpe(["0 1 2 3 4 5 6 7 8 9 <think> </think>"] * 4, VOCABULARY), data / "tokenizer")
    (data / "prompts").mkdir()
    records = [
        {"prompt": f"{i} + {i}", "answer": str(2 * i), "category": "", "difficulty": 1} for i in range(questions)
    ]
    for name in ("train", "heldout"):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (data / "prompts" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    model = Transformer(MODEL)
    init_weights(model, MODEL, seed=3)
    save_model(folder / "sft" / "model", MODEL, model.state_dict())
    return folder


def arguments(
    folder: Path, name: str = "grpo", *, layout: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """What `train` is given, for a stage folder `name` in a folder that was prepared."""
    config = PipelineFields.model_validate(
        {"model": asdict(MODEL), "layout": {"micro_batch": 2, **(layout or {})}, "grpo": SETTINGS | settings,
         "tracking": {"wandb": False}, "data": {"seq_len": 64}, "evaluation": {"questions": 4, "max_new_tokens": 4}}
    )  # fmt: skip
    return {
        "config": config.model_dump(mode="json"), "stage": "grpo", "folder": str(folder / name),
        "upstream": {"data_prep": str(folder / "data"), "sft": str(folder / "sft")},
    }  # fmt: skip


def strike(fault: dict[str, Any] | None, rank: Rank, place: str, iteration: int) -> None:
    """End this process as kill -9 does, once, if it is to happen here."""
    mark = rank.folder / "struck"
    if fault and (fault["place"], fault["iteration"]) == (place, iteration) and rank.is_main and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def train(given: dict[str, Any]) -> dict[str, Any]:
    """On every rank: the stage's loop; `given["fault"]` is {place, iteration}: in rollouts, scoring or update."""
    with opened(given) as (rank, source, trainer):
        collector, engine = source.collector, trainer.engine
        collect, score, step = collector.engine.collect, collector.score, engine.train_step
        started: list[int] = []
        resume = trainer._resume

        def collecting(handle):
            strike(given.get("fault"), rank, "rollouts", source._iteration + 1)
            return collect(handle)

        def scoring(items):
            strike(given.get("fault"), rank, "scoring", source._iteration + 1)
            return score(items)

        def stepping(*batch):
            strike(given.get("fault"), rank, "update", source._iteration)
            return step(*batch)

        collector.engine.collect, collector.score, engine.train_step = collecting, scoring, stepping  # type: ignore[method-assign]
        trainer._resume = lambda: started.append(resume()) or started[0]  # type: ignore[method-assign,func-returns-value]
        figures = trainer.fit(source, dict)
        return figures | {"started": started[0], "digest": weights_digest(engine.full_state())}


@contextmanager
def opened(given: dict[str, Any]) -> Iterator[tuple[Rank, RolloutSource, Trainer]]:
    """The stage's parts, put together as the stage does."""
    torch.set_num_threads(1)
    rank = start_rank(given)
    settings = rank.config.grpo
    config, initial = read_input(rank)
    engine, gap = rank.trainer_engine(config, initial), SamplerGap()
    objective = objective_of(settings, gap)
    with rollout_source(rank, engine, sampling_model(rank, engine), initial, gap) as source:
        yield rank, source, Trainer(rank, engine, objective)
