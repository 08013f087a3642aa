"""kill -9 of a rank at a random moment, in training and while a checkpoint is written: nothing is lost.

The ranks run the real trainer, engine and checkpoints on a toy model. They are forked from a server that has torch
and DeepSpeed imported, so that an attempt costs its steps and not its imports.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engine.checkpoints.checkpoint import find_damage, list_checkpoints
from ray_pipeline.launch.fork_server import start_ranks
from ray_pipeline.launch.launchers import _process_rank, prepare_folder, worker_environment
from ray_pipeline.launch.rank_errors import last_status, status_text
from tests.training.toy_run import arguments, train

KILLS = 20
STEPS = 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp_size": 2},
    "dp2-ep2-zero2": {"dp_size": 2, "ep_size": 2, "zero_stage": 2},
    "tp2": {"tp_size": 2},
    "pp2-zbv": {"pp_size": 2, "schedule": "zbv"},
    "dp2-zero3": {"dp_size": 2, "zero_stage": 3},
}
pytestmark = pytest.mark.slow


def start(job: dict[str, Any], store: Path) -> list[Any]:
    """Two ranks on the job."""
    prepare_folder(Path(job["folder"]))
    store.mkdir()
    job_of_ranks = (2, str(store), 600.0, train, job)
    return start_ranks(_process_rank, job_of_ranks, 2, worker_environment(2, 2, "cpu")).processes


def job_in(folder: Path, layout: str) -> dict[str, Any]:
    return arguments(
        folder, layout=LAYOUTS[layout], steps=STEPS, eval_every=6, checkpoint_every=2, log_every=STEPS, pace=0.02
    )


def finish(ranks: list[Any], store: Path) -> dict[str, Any]:
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    return pickle.loads((store / "value").read_bytes())


def kill_one(ranks: list[Any], stage: Path) -> str | None:
    """Kill one of two training ranks at a random moment; where it was, or None when they were done before that.

    The other must end by itself, in seconds.
    """
    index, steps, while_saving = random.randrange(2), random.randrange(5), random.random() < 0.5
    first: int | None = None
    while all(process.is_alive() for process in ranks):
        step = (last_status(stage, index) or {}).get("step")
        first = step if first is None else first
        saving = bool(list((stage / "checkpoints").glob(".step_*.partial")))
        if first is not None and step >= first + steps and (saving or not while_saving):
            break
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    victim, other = ranks[index], ranks[1 - index]
    if not victim.is_alive() or not other.is_alive():
        return None
    saving = bool(list((stage / "checkpoints").glob(".step_*.partial")))
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    victim.join()
    other.join(60)
    assert time.monotonic() - killed < 30, "the other rank ends in seconds"
    if other.exitcode == 0:  # it was past its last message
        return None
    where = status_text(last_status(stage, index) or {"stage": "", "step": None, "phase": "?"})
    return where + (", a checkpoint in flight" if saving else "")


def test_killed_at_random_moments_every_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    moments: list[str] = []
    for number, layout in enumerate(LAYOUTS):
        folder = tmp_path / layout
        unbroken = finish(start(job_in(folder / "unbroken", layout), folder / "store"), folder / "store")
        wanted, run = KILLS * (number + 1) // len(LAYOUTS), 0
        while len(moments) < wanted:
            run += 1
            moments += killed_run(folder / f"run{run}", layout, wanted - len(moments), unbroken["digest"])
    print("\n".join(moments))
    assert len(moments) == KILLS
    assert any("in flight" in moment for moment in moments), "some were hit while saving"


def killed_run(folder: Path, layout: str, kills: int, digest: str) -> list[str]:
    """One run to its end, killed up to `kills` times on the way; where it was hit."""
    job, moments = job_in(folder, layout), []
    stage = Path(job["folder"])
    for attempt in range(100):
        store = folder / f"store{attempt}"
        folder.mkdir(exist_ok=True)
        ranks = start(job, store)
        if len(moments) == kills:
            break
        where = kill_one(ranks, stage)
        if where is None:
            break
        moments.append(f"{layout}: {where}")
        assert all(find_damage(path) is None for path in list_checkpoints(stage / "checkpoints"))
    assert finish(ranks, store)["digest"] == digest, moments
    return moments
