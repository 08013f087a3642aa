"""Faults put into real training, each caught by its name within ten steps of its beginning."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.records.guard_file import read_interventions
from tests.training import grpo_run, toy_run

pytestmark = pytest.mark.slow

BEGINS = 12  # steps of training that goes well
STEPS = BEGINS + 10


def caught(folder: Path) -> dict[str, int]:
    """Guard -> the first step at which it spoke."""
    found: dict[str, int] = {}
    for event in read_interventions(folder):
        found.setdefault(event["guard"], event["step"])
    return found


@pytest.mark.parametrize(("kind", "guard"), [("spike", "loss spike"), ("dead expert", "dead experts")])
def test_in_pretraining(tmp_path: Path, kind: str, guard: str) -> None:
    fault = {"kind": kind, "rank": -1, "step": BEGINS}
    given = toy_run.arguments(tmp_path, fault=fault, steps=STEPS, log_every=1, eval_every=STEPS, checkpoint_every=STEPS)
    InlineLauncher().run("pretrain", toy_run.train, given)
    assert BEGINS < caught(tmp_path / "toy" / "pretrain-0").get(guard, 0) <= BEGINS + 10


def test_an_entropy_that_collapses_in_grpo(tmp_path: Path) -> None:
    given = grpo_run.arguments(
        grpo_run.prepare(tmp_path), steps=STEPS, beta=0.0, rewards={f"{__name__}:by_letters": 1.0}
    )
    with grpo_run.opened(given) as (rank, source, trainer):
        batch = source.batch

        def sharpened(step: int) -> Any:
            if step == BEGINS:  # the policy is nearly sure of every token from now on
                with torch.no_grad():
                    trainer.engine.parts[-1].lm_head.weight.mul_(15.0)
            return batch(step)

        source.batch = sharpened  # type: ignore[method-assign]
        trainer.fit(source, dict)
    assert BEGINS < caught(rank.folder).get("entropy collapse", 0) <= BEGINS + 10


def test_a_reward_that_is_frozen_in_grpo(tmp_path: Path) -> None:
    given = grpo_run.arguments(grpo_run.prepare(tmp_path), steps=10, rewards={f"{__name__}:always_half": 1.0})
    with grpo_run.opened(given) as (rank, source, trainer):
        trainer.fit(source, dict)
    assert 1 < caught(rank.folder).get("frozen reward", 0) <= 10


def always_half(prompt: str, completion: str, reference: str) -> float:
    """A reward with a fault: it does not look at the answer."""
    return 0.5


def by_letters(prompt: str, completion: str, reference: str) -> float:
    """Differs between answers that differ, so that there is something to learn from as long as any do."""
    return zlib.crc32(completion.encode()) % 97 / 97
