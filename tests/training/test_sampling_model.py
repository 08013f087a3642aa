"""Answers written with the shards that are trained: the rollouts, and the training on them, are one process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.training.heldout import HeldOut
from tests.distributed import run_ranks
from tests.training.grpo_run import arguments, opened, prepare

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-tp2-ep2": {"dp_size": 2, "tp_size": 2, "ep_size": 2},
    "dp2-pp2-zero2": {"dp_size": 2, "pp_size": 2, "zero_stage": 2},
    "sp2-dp2-zero3": {"sp_size": 2, "dp_size": 2, "zero_stage": 3},
}
# Adam would make whole steps of rounding.
SETTINGS = {"max_new_tokens": 6, "optimizer": {"name": "sgd", "schedule": "constant", "warmup_steps": 0, "lr": 0.1}}
SHARDED = {"sampling": "sharded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("run"))


def two_steps(folder: Path, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Held-out answers of the input, two steps, and held-out answers of what they made of it."""
    with opened(arguments(folder, name, layout=layout, **SETTINGS)) as (rank, source, trainer):
        rank.folder.mkdir(exist_ok=True)
        heldout, rollouts, losses, answers = HeldOut(rank, source.model), [], [], []
        collect = source.collector.engine.collect
        source.collector.engine.collect = lambda handle: rollouts.append(collect(handle)) or rollouts[-1]  # type: ignore
        for step in range(2):
            answers.append([item.answers[0].completion for item in heldout.evaluate().items])
            batch = source.batch(step)
            losses.append(trainer.engine.train_step(batch, trainer.objective, 0.1).loss)
        answers.append([item.answers[0].completion for item in heldout.evaluate().items])
        return {"rollouts": rollouts, "losses": losses, "answers": answers, "gap": source.metrics()["sampler_gap_max"]}


def all_layouts(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: two_steps(folder, name, LAYOUTS[name] | SHARDED) for name in LAYOUTS}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(all_layouts, 4, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return two_steps(folder, "alone", {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_and_held_out_answers_over_shards_are_one_process_with_the_whole_model(alone, outcomes, name):
    assert len({tuple(one.tokens) for one in alone["rollouts"][0]}) > 10
    for rank in outcomes:
        got = rank[name]
        assert got["answers"] == alone["answers"]
        for ours, theirs in zip(got["rollouts"], alone["rollouts"], strict=True):
            assert [one.tokens for one in ours] == [one.tokens for one in theirs]
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)
                assert torch.equal(one.routing, other.routing)
        torch.testing.assert_close(got["losses"], alone["losses"], rtol=1e-4, atol=1e-6)
        assert got["gap"] < 2e-5, "the sampler's weights are the trainer's"
