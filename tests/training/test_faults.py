"""Ranks that hang, die or fail: what the others are told, and how soon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.errors import StageFailed
from ray_pipeline.launch.launchers import ProcessLauncher
from ray_pipeline.launch.rank_errors import ERRORS
from tests.training.toy_run import arguments, train

PATIENCE = 8  # seconds; more than ranks differ in when they start


def fail(tmp_path, fault: dict[str, Any], layout: dict[str, Any], timeout: float) -> tuple[str, float]:
    """The error of a run with this fault, and the seconds from the fault to the error."""
    ranks = layout.get("pp_size", 1) * layout.get("dp_size", 1) * layout.get("tp_size", 1)
    job = arguments(tmp_path, layout=layout | {"timeout_seconds": timeout}, fault=fault)
    with pytest.raises(StageFailed) as caught:
        ProcessLauncher(ranks, timeout_seconds=timeout).run("pretrain", train, job)
    # The rank wrote down its place and was struck.
    struck = (Path(job["folder"]) / ERRORS / f"status-{fault['rank']}.json").stat().st_mtime
    return str(caught.value), time.time() - struck


@pytest.mark.parametrize(
    ("layout", "place", "phase", "axis"),
    [
        ({"dp_size": 2}, "pp=0 dp=1 sp=0 tp=0", "optimizer step", "replica"),
        ({"pp_size": 2}, "pp=1 dp=0 sp=0 tp=0", "forward/backward", "pp_back"),
        pytest.param({"tp_size": 2}, "pp=0 dp=0 sp=0 tp=1", "forward/backward", "tp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_with_axis_stage_step_and_phase(tmp_path, layout, place, phase, axis):
    said, _ = fail(tmp_path, {"kind": "hang", "rank": 1, "step": 2}, layout, timeout=PATIENCE)
    assert said.startswith(f"rank 0 (pp=0 dp=0 sp=0 tp=0): no answer in pretrain, step 3, {phase}: ")
    assert f" along {axis}: Timed out waiting {PATIENCE}000ms for " in said
    assert said.endswith(f"last seen in: rank 1 ({place}): pretrain, step 3, next batch")


@pytest.mark.slow
def test_a_rank_that_hangs_in_an_evaluation_is_named(tmp_path):
    fault = {"kind": "hang", "rank": 0, "step": 0, "where": "evaluate"}
    said, _ = fail(tmp_path, fault, {"dp_size": 2}, timeout=PATIENCE)
    assert said.startswith("rank 1 (pp=0 dp=1 sp=0 tp=0): no answer in pretrain, step 4, evaluating: ")
    assert said.endswith("rank 0 (pp=0 dp=0 sp=0 tp=0): pretrain, step 4, evaluating")


@pytest.mark.parametrize(("kind", "zero_stage"), [("kill", 0), pytest.param("exit", 1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_others_in_seconds(tmp_path, kind, zero_stage):
    layout = {"dp_size": 2, "zero_stage": zero_stage}
    said, seconds = fail(tmp_path, {"kind": kind, "rank": 1, "step": 2}, layout, timeout=600)
    assert seconds < 30
    assert said.startswith("rank 0 (pp=0 dp=0 sp=0 tp=0): no answer in pretrain, step 3, ")
    assert " along replica: " in said
    assert "rank 1 (pp=0 dp=1 sp=0 tp=0): pretrain, step 3, next batch" in said


def test_a_bug_on_one_rank_is_told_and_not_its_echo(tmp_path):
    said, seconds = fail(tmp_path, {"kind": "bug", "rank": 1, "step": 2}, {"dp_size": 2}, timeout=600)
    assert said.startswith("rank 1: ZeroDivisionError: a bug (")
    assert seconds < 30
