"""Ranks that hang, die or fail: what the others are told, and how soon."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ray_pipeline.errors import StageFailed
from ray_pipeline.launcher import ProcessLauncher
from tests.training.toy_run import arguments, train


def fail(tmp_path, fault: dict[str, Any], layout: dict[str, Any], timeout: float) -> tuple[str, float]:
    """The error of a run with this fault, and the seconds from its start to the error."""
    ranks = layout.get("pp_size", 1) * layout.get("dp_size", 1) * layout.get("tp_size", 1)
    job = arguments(tmp_path, layout=layout | {"timeout_seconds": timeout}, fault=fault)
    started = time.monotonic()
    with pytest.raises(StageFailed) as caught:
        ProcessLauncher(ranks, timeout_seconds=timeout).run("pretrain", train, job)
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize(
    ("layout", "place", "axis"),
    [
        ({"dp_size": 2}, "pp=0 dp=1 sp=0 tp=0", "replica"),
        ({"pp_size": 2}, "pp=1 dp=0 sp=0 tp=0", "pp"),
        ({"tp_size": 2}, "pp=0 dp=0 sp=0 tp=1", "tp"),
    ],
)
def test_a_rank_that_hangs_is_named_with_axis_stage_step_and_phase(tmp_path, layout, place, axis):
    said, _ = fail(tmp_path, {"kind": "hang", "rank": 1, "step": 2}, layout, timeout=3)
    assert said.startswith("rank 0 (pp=0 dp=0 sp=0 tp=0): no answer in pretrain, step 3, forward/backward: ")
    assert f" along {axis}: Timed out waiting 3000ms for " in said
    assert said.endswith(f"last seen in: rank 1 ({place}): pretrain, step 3, next batch")


def test_a_rank_that_hangs_in_an_evaluation_is_named(tmp_path):
    said, _ = fail(tmp_path, {"kind": "hang", "rank": 0, "step": 0, "where": "evaluate"}, {"dp_size": 2}, timeout=3)
    assert said.startswith("rank 1 (pp=0 dp=1 sp=0 tp=0): no answer in pretrain, step 4, evaluating: ")
    assert said.endswith("rank 0 (pp=0 dp=0 sp=0 tp=0): pretrain, step 4, evaluating")


@pytest.mark.parametrize(("kind", "zero_stage"), [("kill", 0), ("exit", 1)])
def test_a_rank_that_dies_ends_the_others_in_seconds(tmp_path, kind, zero_stage):
    layout = {"dp_size": 2, "zero_stage": zero_stage}
    said, seconds = fail(tmp_path, {"kind": kind, "rank": 1, "step": 2}, layout, timeout=600)
    assert seconds < 30
    assert said.startswith("rank 0 (pp=0 dp=0 sp=0 tp=0): no answer in pretrain, step 3, ")
    assert "rank 1 (pp=0 dp=1 sp=0 tp=0): pretrain, step 3, next batch" in said


def test_a_bug_on_one_rank_is_told_and_not_its_echo(tmp_path):
    said, seconds = fail(tmp_path, {"kind": "bug", "rank": 1, "step": 2}, {"dp_size": 2}, timeout=600)
    assert said.startswith("rank 1: ZeroDivisionError: a bug (")
    assert seconds < 30
