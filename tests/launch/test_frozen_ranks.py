"""A rank that froze is named in time, with every rank's Python stack; one that is slow is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_pipeline.dag.progress_view import ProgressView
from ray_pipeline.errors import StageFailed
from ray_pipeline.launch import frozen_ranks, heartbeat
from ray_pipeline.launch.frozen_ranks import FrozenWatch
from ray_pipeline.launch.heartbeat import Heartbeat, is_here, machine, process_stat, python_stack
from ray_pipeline.launch.launchers import InlineLauncher, ProcessLauncher, RayLauncher
from ray_pipeline.launch.rank_errors import ERRORS, FROZEN, RankScope, RankStatus, frozen_reports
from ray_pipeline.settings.layout_config import LayoutConfig
from tests.training.toy_run import arguments, train

SECONDS = 6.0


def fail(job: dict[str, Any], function: Any = train, seconds: float = SECONDS) -> tuple[StageFailed, float]:
    """The error of two ranks, and seconds from when rank 1 wrote down its last place."""
    with pytest.raises(StageFailed) as caught:
        ProcessLauncher(2, frozen_seconds=seconds).run("pretrain", function, job)
    struck = (Path(job["folder"]) / ERRORS / "status-1.json").stat().st_mtime
    return caught.value, time.time() - struck


def test_a_rank_that_is_stopped_is_named_and_ended_with_the_stacks_of_all(tmp_path):
    fault = {"kind": "stop", "rank": 1, "step": 2}
    error, seconds = fail(arguments(tmp_path, layout={"dp_size": 2}, fault=fault))
    assert str(error).startswith(
        "rank 1 (pp=0 dp=1 sp=0 tp=0) is frozen in pretrain, step 3, next batch: it has given no sign of life for "
    )
    assert "is stopped (SIGSTOP, or a debugger)" in str(error)
    assert seconds < SECONDS + 30
    first, second = error.details.split("rank 1:\n")
    assert "rank 0:" in first and "train_step" in first
    assert "strike" in second.split("\n\n\n")[0] or "py-spy may not look at process" in second


def hangs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 never comes to where rank 0 waits for it."""
    import torch.distributed as dist

    rank = dist.get_rank()
    RankStatus(Path(arguments["folder"]), rank, {"pp": 0, "dp": rank, "sp": 0, "tp": 0}, "sft").at("evaluating", 7)
    if rank == 1:
        time.sleep(3600)
    dist.barrier()
    return {}


def test_by_default_a_frozen_rank_is_named_within_a_minute():
    assert LayoutConfig().frozen_seconds == frozen_ranks.SECONDS
    assert frozen_ranks.SECONDS + frozen_ranks.POLL + heartbeat.BEAT + frozen_ranks.COLLECT_SECONDS < 60


def test_a_rank_that_stands_still_while_another_waits_for_it_is_named(tmp_path):
    error, _ = fail({"folder": str(tmp_path)}, hangs)
    said = str(error)
    assert said.startswith("rank 1 (pp=0 dp=1 sp=0 tp=0) is frozen in sft, step 7, evaluating: it has stood still at ")
    assert "test_frozen_ranks.py:" in said and said.endswith("without computing, while rank 0 waits for it")
    assert "hangs" in error.details and "barrier" in error.details


def slow(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 computes in one call, then waits for a process of its own; rank 0 waits for it all the time."""
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        matrix, began = torch.ones(400, 400), time.monotonic()
        while time.monotonic() - began < arguments["seconds"]:
            torch.linalg.svd(matrix)
        subprocess.run([sys.executable, "-c", f"import time; time.sleep({arguments['seconds']})"], check=True)
    dist.barrier()
    return {"done": True}


def test_a_slow_rank_is_left_alone(tmp_path):
    job = {"folder": str(tmp_path), "seconds": 6.0}
    assert ProcessLauncher(2, frozen_seconds=3.0).run("sft", slow, job) == {"done": True}
    assert frozen_reports(tmp_path) == []


def test_watching_can_be_turned_off_and_ranks_leave_no_beat_behind(tmp_path):
    job = arguments(tmp_path, steps=2)
    InlineLauncher().run("pretrain", train, job)
    assert not list((Path(job["folder"]) / ERRORS).glob("beat-*"))
    with FrozenWatch(tmp_path, 0) as watch:
        assert not watch._thread.is_alive()


@pytest.mark.slow
def test_a_rank_that_froze_once_is_ended_and_the_stage_goes_on(tmp_path):
    import ray

    from ray_pipeline.launch.local_ray import start_ray

    unbroken = ProcessLauncher(2).run("pretrain", train, arguments(tmp_path / "a", layout={"dp_size": 2}))
    job = arguments(tmp_path / "b", layout={"dp_size": 2}, fault={"kind": "stop once", "rank": 1, "step": 5})
    start_ray(num_cpus=2, include_dashboard=False)
    restarted = RayLauncher(2, "cpu", max_restarts=1, frozen_seconds=10.0).run("pretrain", train, job)
    ray.shutdown()
    assert restarted["started"] in (2, 4) and restarted | {"started": 0} == unbroken
    (page,) = frozen_reports(Path(job["folder"]))
    assert "is stopped (SIGSTOP" in page["text"]


def beat(folder: Path, rank: int, **more: Any) -> dict[str, Any]:
    """What a rank of another machine wrote."""
    state = {"beat": 1, "pid": 4_000_000 + rank, "started": 1, "machine": "elsewhere", "still": 0.0,
             "cpu": 0.5, "bytes": 9000, "for_ranks": False, "for_others": False, "at": "model.py:3"} | more  # fmt: skip
    (folder / ERRORS).mkdir(exist_ok=True)
    (folder / ERRORS / f"beat-{rank}.json").write_text(json.dumps(state))
    return state


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenWatch:
    monkeypatch.setattr("ray_pipeline.launch.frozen_ranks.COLLECT_SECONDS", 0.1)
    return FrozenWatch(folder, 40.0)


def test_a_rank_of_a_machine_that_went_silent_is_named_while_others_live(tmp_path, monkeypatch):
    watch = watched(tmp_path, monkeypatch)
    beat(tmp_path, 1)
    for second in range(60):
        beat(tmp_path, 0, beat=second, machine="another")
        watch.look(1.0)
    (page,) = frozen_reports(tmp_path)
    assert page["ranks"] == [1] and "its machine does not answer" in page["text"]
    assert "rank 0:\nno answer from its machine" in page["stacks"]


@pytest.mark.parametrize(
    "others", [None, {"machine": "elsewhere"}], ids=["nobody lives", "killed, and its machine lives"]
)
def test_what_a_killed_rank_left_behind_is_no_frozen_one(tmp_path, monkeypatch, others):
    watch = watched(tmp_path, monkeypatch)
    beat(tmp_path, 1)
    for second in range(100):
        if others is not None:
            beat(tmp_path, 0, beat=second, **others)
        watch.look(1.0)
    assert frozen_reports(tmp_path) == []


STILL = {"still": 50.0}


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (STILL, STILL | {"for_ranks": True}, True),
        (STILL | {"for_others": True}, STILL | {"for_ranks": True}, False),
        (STILL | {"for_ranks": True}, STILL | {"for_ranks": True}, False),
        (STILL, STILL, False),
        ({"still": 39.0}, STILL | {"for_ranks": True}, False),
        (STILL | {"cpu": 20.0}, STILL | {"for_ranks": True}, False),
        (STILL | {"bytes": 10**9}, STILL | {"for_ranks": True}, False),
    ],
    ids=["still", "waits for a process", "all wait for ranks", "nobody waits", "not long enough", "computes", "writes"],
)
def test_only_who_stands_still_while_another_waits_is_frozen(tmp_path, monkeypatch, one, other, named):
    watch = watched(tmp_path, monkeypatch)
    beat(tmp_path, 0, **other)
    beat(tmp_path, 1, **one)
    watch.look(1.0)
    assert [page["ranks"] for page in frozen_reports(tmp_path)] == ([[1]] if named else [])


def test_a_watch_that_was_itself_stopped_blames_nobody(tmp_path, monkeypatch):
    watch = watched(tmp_path, monkeypatch)
    beat(tmp_path, 0)
    beat(tmp_path, 1)
    watch.look(1.0)
    watch.look(3.0)  # an hour of the clock counts as MOST_OF_A_POLL
    assert frozen_reports(tmp_path) == []


def test_where_stacks_may_not_be_read_it_says_so_and_a_rank_shows_its_own(tmp_path, monkeypatch):
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho 'Error: Permission Denied: try as root' >&2\nexit 1\n")
    spy.chmod(0o755)
    monkeypatch.setattr(heartbeat.sys, "executable", str(tmp_path / "python"))
    said = python_stack(os.getpid())
    assert "may not look at process" in said and "Permission Denied" in said and "SYS_PTRACE" in said
    own = Heartbeat(tmp_path, 0)._own_stack()
    assert "may not look at process" in own and "test_where_stacks_may_not_be_read" in own


def test_a_rank_has_given_a_sign_of_life_as_soon_as_it_began(tmp_path):
    heartbeat_of_two = Heartbeat(tmp_path, 2)
    heartbeat_of_two.start()
    first = json.loads(heartbeat.beat_file(tmp_path, 2).read_text())
    heartbeat_of_two.stop()
    assert first["beat"] >= 1 and first["pid"] == os.getpid() and is_here(first)


def test_a_process_is_known_by_its_start_so_that_no_other_is_ended():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = process_stat(child.pid)
    assert found is not None
    known = {"pid": child.pid, "started": found[2], "machine": machine()}
    assert is_here(known) and not is_here(known | {"started": found[2] + 1}) and not is_here(known | {"machine": "x"})
    heartbeat.end_here({0: known | {"started": found[2] + 1}})
    assert child.poll() is None
    heartbeat.end_here({0: known})
    assert child.wait(10) == -signal.SIGKILL
    assert not is_here(known)


def test_the_progress_view_tells_of_a_frozen_rank_once_and_a_restart_keeps_the_report(tmp_path, capsys):
    stage = tmp_path / "sft"
    (stage / ERRORS).mkdir(parents=True)
    page = {"ranks": [1], "text": "rank 1 is frozen in sft, step 3", "stacks": "", "time": 5.0}
    (stage / ERRORS / FROZEN).write_text(json.dumps(page))
    with ProgressView(Console(width=200), {"sft": stage}) as view:
        view.start("sft")
        view.refresh()
        with RankScope(stage, 0):
            view.refresh()
    assert capsys.readouterr().out.count("rank 1 is frozen in sft, step 3. It is ended; the stacks are in") == 1
    assert not (stage / ERRORS / FROZEN).exists() and frozen_reports(stage) == [page]


def test_the_places_where_ranks_wait_for_each_other_are_files_that_are_there():
    packages = [Path(__file__).parents[2] / name for name in ("model", "ray_pipeline")]
    ours = [place[1:] for place in heartbeat._FOR_RANKS if place.endswith(".py")]
    assert ours and all(any((package / place).is_file() for package in packages) for place in ours)
