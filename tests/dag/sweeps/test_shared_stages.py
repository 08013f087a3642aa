"""A stage that another run of the sweep has: linked where it is finished, moved where it was begun, waited for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import Record, read_record, write_record
from ray_pipeline.dag.sweeps.shared_stages import alone, take_over, tell_failure, told_failure
from ray_pipeline.records.artifacts import write_text


def stage(run: Path, status: str) -> Path:
    folder = run / "pretrain-0123456789"
    write_text(folder / "model" / "weights", run.name)
    write_record(folder, Record("pretrain", "0123456789", status))
    return folder


def test_a_finished_stage_is_had_by_both_runs_and_either_can_go(tmp_path):
    there, here = stage(tmp_path / "a", "done"), tmp_path / "b" / "pretrain-0123456789"
    assert take_over(here, tmp_path) == "a"
    assert read_record(here) == read_record(there) and (here / "model" / "weights").read_text() == "a"
    assert (here / "model" / "weights").stat().st_ino == (there / "model" / "weights").stat().st_ino
    write_text(here / "model" / "weights", "written anew")  # a new file, so the other run keeps its own
    assert (there / "model" / "weights").read_text() == "a"


def test_a_finished_stage_takes_the_place_of_a_begun_one(tmp_path):
    here = stage(tmp_path / "b", "failed")
    stage(tmp_path / "a", "learned_nothing")
    assert take_over(here, tmp_path) == "a"
    record = read_record(here)
    assert record is not None and record.is_finished and (here / "model" / "weights").read_text() == "a"


def test_a_begun_stage_moves_to_the_run_that_goes_on_with_it(tmp_path):
    there, here = stage(tmp_path / "a", "running"), tmp_path / "b" / "pretrain-0123456789"
    assert take_over(here, tmp_path) == "a"
    assert not there.exists() and (here / "model" / "weights").read_text() == "a"
    assert take_over(here, tmp_path) is None, "its own attempt is no other run's"


def test_own_attempts_are_kept_and_other_stages_are_none(tmp_path):
    here = stage(tmp_path / "b", "running")
    stage(tmp_path / "a", "running")
    assert take_over(here, tmp_path) is None and (here / "model" / "weights").read_text() == "b"
    assert take_over(tmp_path / "c" / "pretrain-9999999999", tmp_path) is None


def test_one_trial_at_a_time_works_on_a_stage(tmp_path):
    order, waiting = [], threading.Event()

    def other() -> None:
        waiting.set()
        with alone(tmp_path, "pretrain-0"):
            order.append("other")

    with alone(tmp_path, "pretrain-0"), alone(tmp_path, "sft-0"):
        thread = threading.Thread(target=other)
        thread.start()
        assert waiting.wait(10)
        thread.join(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


@pytest.mark.parametrize("damage", [None, "{", "[]"])
def test_a_failure_is_told_within_one_call_of_sweep(tmp_path, damage):
    with alone(tmp_path, "pretrain-0") as word:
        assert told_failure(word, "one") is None
        tell_failure(word, "one", "01-seed0", "loss nan")
        assert told_failure(word, "one") == "as in 01-seed0: loss nan"
        assert told_failure(word, "two") is None
        if damage is not None:
            word.write_text(damage)
            assert told_failure(word, "one") is None
