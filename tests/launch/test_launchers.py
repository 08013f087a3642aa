"""Ranks return, fail and are told apart, however they were started. Ray's launcher is tested with the workflow."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.errors import StageFailed, UserError
from ray_pipeline.launch.launchers import (
    WORKERS_LOCK,
    InlineLauncher,
    ProcessLauncher,
    prepare_folder,
    worker_environment,
)


def add_up(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return {
        "sum": value.item() * arguments["times"],
        "rank": dist.get_rank(),
        "accelerator": os.environ.get("DS_ACCELERATOR"),
    }


def mistake_on_rank_one(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise UserError("lr=9: training diverged. Lower lr.")
    dist.barrier()
    return {}


def bug_on_rank_one(arguments: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ZeroDivisionError("a bug")
    dist.barrier()
    return {}


def die(arguments: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}


def inline_mistake(arguments: dict[str, Any]) -> dict[str, Any]:
    raise UserError("value, reason, way out")


def test_three_processes_reduce_and_rank_zero_returns(tmp_path):
    value = ProcessLauncher(3).run("toy", add_up, {"folder": str(tmp_path / "stage"), "times": 2})
    assert value == {"sum": 12.0, "rank": 0, "accelerator": "cpu"}


def test_inline_rank_has_a_process_group_and_leaves_none(tmp_path):
    import torch.distributed as dist

    value = InlineLauncher().run("toy", add_up, {"folder": str(tmp_path), "times": 1})
    assert (value["sum"], value["rank"]) == (1.0, 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("launcher", [InlineLauncher(), ProcessLauncher(1)])
def test_user_error_keeps_its_message(tmp_path, launcher):
    with pytest.raises(UserError, match=r"^value, reason, way out$"):
        launcher.run("toy", inline_mistake, {"folder": str(tmp_path)})


def test_user_error_on_one_rank_outranks_the_echo_on_the_others(tmp_path):
    with pytest.raises(UserError, match=r"^lr=9: training diverged\. Lower lr\.$"):
        ProcessLauncher(2).run("toy", mistake_on_rank_one, {"folder": str(tmp_path)})


def test_bug_names_rank_cause_and_line_and_keeps_the_traceback(tmp_path):
    with pytest.raises(StageFailed, match=r"^rank 1: ZeroDivisionError: a bug \(.*test_launchers\.py:\d+\)$") as caught:
        ProcessLauncher(2).run("toy", bug_on_rank_one, {"folder": str(tmp_path)})
    assert "Traceback" in caught.value.details


def test_killed_rank_is_told(tmp_path):
    with pytest.raises(StageFailed, match=r"^toy: a rank's process ended: .*SIGKILL"):
        ProcessLauncher(1).run("toy", die, {"folder": str(tmp_path)})


def test_errors_of_an_earlier_launch_are_forgotten(tmp_path):
    with pytest.raises(UserError):
        ProcessLauncher(1).run("toy", inline_mistake, {"folder": str(tmp_path)})
    assert ProcessLauncher(1).run("toy", add_up, {"folder": str(tmp_path), "times": 1})["sum"] == 1.0


def test_live_workers_of_an_earlier_run_are_waited_for_then_named(tmp_path):
    with (tmp_path / WORKERS_LOCK).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"\.workers\.lock: held for 0 s by workers of an earlier run.*fuser"):
            prepare_folder(tmp_path, wait=0.3)
        assert time.monotonic() - started >= 0.3
    prepare_folder(tmp_path, wait=0.3)


@given(st.integers(1, 64), st.integers(1, 256))
def test_threads_of_all_ranks_fit_the_cores(ranks, cores):
    threads = int(worker_environment(ranks, cores, "cpu")["OMP_NUM_THREADS"])
    assert threads >= 1
    assert threads * ranks <= max(ranks, cores)


def test_cpu_ranks_hide_gpus_and_gpu_ranks_do_not():
    assert worker_environment(1, 2, "cpu")["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in worker_environment(1, 2, "cuda")


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        prepare_folder(Path(tmp_path, "file", "stage"))
