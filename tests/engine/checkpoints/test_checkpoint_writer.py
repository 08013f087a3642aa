"""Checkpoints are written beside training: whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.checkpoints.checkpoint import find_damage, list_checkpoints, load_checkpoint, step_of
from ray_pipeline.engine.checkpoints.checkpoint_writer import BEST_FILE, CheckpointWriter
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.records.integrity import unsealed
from tests.engine.test_parity import CONFIG, OPTIMIZER, make_batch


def build(seed: int = 0) -> Engine:
    return Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, micro_batch=2, seed=seed))


def step(engine: Engine, number: int) -> float:
    return engine.train_step(make_batch(number), CrossEntropy(0.3), 1e-2).loss


class Held(CheckpointWriter):
    """Its thread waits for a word before it writes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.go_on = threading.Event()

    def _write(self, *args) -> None:
        assert self.go_on.wait(60)
        super()._write(*args)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_training_goes_on_while_the_snapshot_is_written(tmp_path):
    engine = build()
    step(engine, 0)
    at_save = engine.full_state()
    with Held(engine.mesh, tmp_path, keep=2) as writer:
        writer.save(engine, 1, {"note": 1.5})
        step(engine, 1)
        assert names(tmp_path) == []
        writer.go_on.set()
    other = build(seed=7)
    page = load_checkpoint(other, tmp_path / "step_00000001")
    assert (page["step"], page["extra"]) == (1, {"note": 1.5})
    assert all(torch.equal(tensor, at_save[name]) for name, tensor in other.full_state().items())
    assert step(other, 1) == step_again(at_save)


def step_again(state: dict[str, torch.Tensor]) -> float:
    """Loss of step 1 from these weights, which does not depend on the moments."""
    return step(Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, micro_batch=2), initial=state), 1)


def test_the_next_save_waits_for_the_one_in_flight(tmp_path):
    engine = build()
    with Held(engine.mesh, tmp_path, keep=2) as writer:
        writer.save(engine, 1, {})
        threading.Timer(0.3, writer.go_on.set).start()
        writer.save(engine, 2, {})
        assert names(tmp_path)[:1] == ["step_00000001"]
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_an_error_on_the_way_waits_for_the_one_in_flight(tmp_path):
    engine = build()
    with pytest.raises(ZeroDivisionError), Held(engine.mesh, tmp_path, keep=2) as writer:
        writer.save(engine, 1, {})
        threading.Timer(0.3, writer.go_on.set).start()
        raise ZeroDivisionError
    assert names(tmp_path) == ["step_00000001"]


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_by_the_next_save_and_the_old_checkpoint_stays(tmp_path):
    engine = build()
    writer = CheckpointWriter(engine.mesh, tmp_path, keep=1)
    writer.save(engine, 1, {})
    writer.wait()
    with small_disk(100_000), pytest.raises(UserError, match=r"step_00000002.*the disk is full"):
        writer.save(engine, 2, {})
        writer.save(engine, 3, {})
    assert names(tmp_path) == ["step_00000001"]
    assert find_damage(tmp_path / "step_00000001") is None
    with writer:
        writer.save(engine, 3, {})
    assert names(tmp_path) == ["step_00000003"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"], "leftovers are gone"


def test_an_error_in_the_thread_is_raised_at_the_end_with_its_place(tmp_path):
    engine = build()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="a file is in the way"),
        CheckpointWriter(engine.mesh, tmp_path / "file" / "checkpoints", keep=1) as writer,
    ):
        writer.save(engine, 1, {})


def best(value: float) -> dict:
    return {"best": {"step": 0, "figure": "accuracy", "value": value}}


def test_the_newest_and_the_best_are_kept_and_the_best_is_named(tmp_path):
    engine = build()
    mark = tmp_path / BEST_FILE
    with CheckpointWriter(engine.mesh, tmp_path, keep=2) as writer:
        for number, best_step in ((1, 1), (2, 1), (3, 1), (4, 1)):
            writer.save(engine, number, best(0.5), best=best_step)
        writer.wait()
        assert names(tmp_path) == ["step_00000001", "step_00000003", "step_00000004"]
        assert unsealed(mark.read_bytes())["checkpoint"] == "step_00000001"
        writer.save(engine, 5, best(0.7), best=5)
        writer.wait()
        assert names(tmp_path) == ["step_00000004", "step_00000005"]
        assert unsealed(mark.read_bytes()) == {
            "checkpoint": "step_00000005", "step": 0, "figure": "accuracy", "value": 0.7
        }  # fmt: skip
        writer.save(engine, 6, best(0.9), best=3)
        writer.wait()
        assert not mark.exists(), "it would name a checkpoint that is gone"
        writer.save(engine, 7, {})
    assert names(tmp_path) == ["step_00000006", "step_00000007"]


def test_the_same_step_again_replaces_the_checkpoint(tmp_path):
    engine = build()
    for note in (1, 2):
        with CheckpointWriter(engine.mesh, tmp_path, keep=2) as writer:
            writer.save(engine, 1, {"note": note})
    assert load_checkpoint(engine, tmp_path / "step_00000001")["extra"] == {"note": 2}
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.gpu
def test_weights_on_a_gpu_are_saved_beside_training_and_come_back_exactly(tmp_path):
    device = torch.device("cuda")
    engines = [
        Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, micro_batch=2, seed=seed, device=device))
        for seed in (0, 7)
    ]
    step(engines[0], 0)
    with CheckpointWriter(engines[0].mesh, tmp_path, keep=2) as writer:
        writer.save(engines[0], 1, {})
        expected = step(engines[0], 1)
    load_checkpoint(engines[1], tmp_path / "step_00000001")
    assert step(engines[1], 1) == expected


def save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    engine = build()
    with CheckpointWriter(engine.mesh, folder, keep=2) as writer:
        for number in range(1, 10_000):
            writer.save(engine, number, best(number), best=number - number % 3 or None)


def test_killed_at_any_moment_of_saving_every_checkpoint_is_whole(tmp_path):
    build()  # what is imported late is there before the fork
    seen = set()
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(folder,))
        process.start()
        while max((step_of(path) for path in folder.glob("step_*")), default=0) < 1 + attempt % 4:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = list_checkpoints(folder)
        assert found and all(find_damage(path) is None for path in found)
        mark = folder / BEST_FILE
        assert not mark.exists() or (folder / unsealed(mark.read_bytes())["checkpoint"]).is_dir()
        seen.add(found[-1].name)
    assert len(seen) > 1, "kills came at different moments"
