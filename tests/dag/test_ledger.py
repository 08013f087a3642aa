"""Records, the lock, and what `status` reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import (
    Record,
    RunFile,
    RunLock,
    begin_record,
    close_record,
    lock_holder,
    read_record,
    read_status,
    write_record,
)
from ray_pipeline.errors import UserError
from ray_pipeline.settings.run_folder import LOCK

ROOT = Path(__file__).parents[2]


def started(folder: Path) -> Record:
    return begin_record(folder, Record("sft", "abc", "running"))


def test_record_survives_writing_and_reading(tmp_path):
    record = started(tmp_path)
    close_record(tmp_path, record, "done", metrics={"accuracy": 0.5}, learned=True, weights_digest="d" * 64)
    found = read_record(tmp_path)
    assert found == record
    assert found is not None
    assert found.is_finished


def test_nothing_started_has_no_record(tmp_path):
    assert read_record(tmp_path) is None


def test_record_of_a_later_version_is_read(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"stage": "sft", "identity": "a", "status": "done", "new": 1}))
    found = read_record(tmp_path)
    assert found is not None
    assert found.is_finished


def test_seconds_and_attempts_add_up_over_failures_and_kills(tmp_path):
    first = started(tmp_path)
    first.started -= 10
    close_record(tmp_path, first, "failed", error="x")
    killed = started(tmp_path)
    killed.started -= 100
    write_record(tmp_path, killed)
    (tmp_path / "progress.json").write_text(json.dumps({"time": killed.started + 5}))
    third = started(tmp_path)
    assert third.attempt == 3
    assert third.seconds == pytest.approx(15, abs=0.5)


def test_learned_nothing_is_finished_and_failed_is_not():
    assert Record("sft", "a", "learned_nothing").is_finished
    assert not Record("sft", "a", "failed").is_finished
    assert not Record("sft", "a", "running").is_finished


def test_second_lock_is_refused_naming_the_holder_and_freed_afterwards(tmp_path):
    with RunLock(tmp_path):
        assert lock_holder(tmp_path)["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match=rf"process {os.getpid()} on .* is working on this run.*--run-name"),
            RunLock(tmp_path),
        ):
            pass
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path):
        pass


def test_lock_is_free_after_kill_9_of_its_holder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ray_pipeline.dag.ledger import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), RunLock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with RunLock(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_wandb_id_is_stable_and_differs_by_run_stage_identity_and_rerun(tmp_path):
    run = RunFile(tmp_path)
    run.save()
    again = RunFile(tmp_path)
    assert again.wandb_id("sft", "a") == run.wandb_id("sft", "a")
    other = RunFile(tmp_path / "other")
    ids = {run.wandb_id("sft", "a"), run.wandb_id("sft", "b"), run.wandb_id("grpo", "a"), other.wandb_id("sft", "a")}
    again.reruns["a"] = 1
    assert len(ids | {again.wandb_id("sft", "a")}) == 5


def test_status_tells_pending_running_interrupted_and_done(tmp_path):
    assert [entry["status"] for entry in read_status(tmp_path)["stages"]] == ["pending"] * 6
    run = RunFile(tmp_path)
    for stage in ("data_prep", "pretrain", "sft"):
        run.stages[stage] = {"identity": "a", "folder": f"{stage}-a", "decides": {}}
    run.save()
    close_record(
        tmp_path / "data_prep-a", begin_record(tmp_path / "data_prep-a", Record("data_prep", "a", "running")), "done"
    )
    begin_record(tmp_path / "pretrain-a", Record("pretrain", "a", "running"))
    assert [e["status"] for e in read_status(tmp_path)["stages"]][:3] == ["done", "interrupted", "pending"]
    with RunLock(tmp_path):
        status = read_status(tmp_path)
    assert [entry["status"] for entry in status["stages"]][:3] == ["done", "running", "pending"]
    assert status["worked_on_by"]["pid"] == os.getpid()
    json.dumps(status)
