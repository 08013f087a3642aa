"""What ranks leave behind, and the one error that is told from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.collectives import Axis, CollectiveFailed, collective
from ray_pipeline.errors import UserError
from ray_pipeline.launch.rank_errors import (
    ERRORS,
    RankScope,
    RankStatus,
    explain_failure,
    last_status,
    lost_message,
    rank_errors,
    status_text,
)

GLOO = (
    "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:740. "
    "This is typically caused by a remote worker crashing."
)
ORIGIN = dict.fromkeys(("pp", "dp", "sp", "tp"), 0)


def end(folder: Path, rank: int, error: Exception) -> None:
    """A rank that stood in step 3's backward pass ends in `error`."""
    with pytest.raises(type(error)), RankScope(folder, rank):
        stand(folder, rank)
        raise error


def stand(folder: Path, rank: int) -> None:
    RankStatus(folder, rank, ORIGIN | {"dp": rank}, "sft").at("forward/backward", 3)


def failed() -> CollectiveFailed:
    try:
        with collective(Axis("dp"), "all-reduce"):
            raise RuntimeError(GLOO)
    except CollectiveFailed as error:
        return error


def test_a_lost_message_names_rank_axis_stage_step_and_phase_and_who_is_silent(tmp_path):
    with RankScope(tmp_path, 1):
        stand(tmp_path, 1)
    end(tmp_path, 0, failed())
    error = explain_failure(tmp_path, "fallback", "details")
    assert str(error) == (
        "rank 0 (pp=0 dp=0 sp=0 tp=0): no answer in sft, step 3, forward/backward: all-reduce along dp: "
        "Connection closed by peer [127.0.0.1]:740. Killed or hanging, last seen in: "
        "rank 1 (pp=0 dp=1 sp=0 tp=0): sft, step 3, forward/backward"
    )
    assert "Traceback" in error.details


def test_the_cause_outranks_lost_messages_that_came_before_it(tmp_path):
    end(tmp_path, 0, failed())
    end(tmp_path, 1, ZeroDivisionError("a bug"))
    assert str(explain_failure(tmp_path, "", "")).startswith("rank 1: ZeroDivisionError: a bug (")


def test_a_users_mistake_outranks_everything(tmp_path):
    end(tmp_path, 0, ZeroDivisionError("a bug"))
    end(tmp_path, 1, UserError("lr=9: too high. Lower it."))
    with pytest.raises(UserError, match=r"^lr=9: too high\. Lower it\.$"):
        explain_failure(tmp_path, "", "")


def test_when_no_rank_said_anything_their_statuses_are_told(tmp_path):
    stand(tmp_path, 0)
    assert str(explain_failure(tmp_path, "sft: died", "")) == (
        "sft: died. Killed or hanging, last seen in: rank 0 (pp=0 dp=0 sp=0 tp=0): sft, step 3, forward/backward"
    )


def test_a_restarted_rank_forgets_its_earlier_error(tmp_path):
    end(tmp_path, 0, ZeroDivisionError("a bug"))
    with RankScope(tmp_path, 0):
        assert rank_errors(tmp_path) == []


def test_an_error_that_a_restarting_rank_takes_away_under_the_reader_is_left_out(tmp_path):
    end(tmp_path, 0, ZeroDivisionError("a bug"))
    (tmp_path / ERRORS / "rank-1.json").symlink_to("taken-away")  # listed, and gone when it is read
    assert [entry["rank"] for entry in rank_errors(tmp_path)] == [0]


@given(st.lists(st.tuples(st.text(max_size=40), st.none() | st.integers(0, 10**9)), min_size=1, max_size=8))
def test_the_status_in_the_file_is_the_latest(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("status")
    status, step = RankStatus(folder, 2, ORIGIN, "grpo"), None
    for phase, given_step in changes:
        status.at(phase, given_step)
        step = step if given_step is None else given_step
        found = last_status(folder, 2)
        assert found is not None and (found["phase"], found["step"]) == (phase, step)
    assert status_text({"stage": "grpo", "step": None, "phase": "starting"}) == "grpo, starting"


def test_only_messages_between_ranks_count_as_lost():
    assert lost_message(RuntimeError(GLOO)) == "Connection closed by peer [127.0.0.1]:740"
    assert lost_message(RuntimeError("shape mismatch")) is None
    assert lost_message(ValueError("gloo")) is None
    outer = ValueError("outer")
    outer.__cause__ = failed()
    assert lost_message(outer) == "all-reduce along dp: Connection closed by peer [127.0.0.1]:740"
