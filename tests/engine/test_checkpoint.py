"""Checkpoints: what was saved comes back exactly, in any layout, and never half."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, make_batch


def build(pp: int = 1, dp: int = 1, zero_stage: int = 0, seed: int = 0) -> Engine:
    torch.set_num_threads(1)
    mesh = Mesh(MeshSizes(pp=pp, dp=dp))
    return Engine(CONFIG, mesh, optimizer=OPTIMIZER, zero_stage=zero_stage, micro_batch=2, seed=seed)


def steps(engine: Engine, first: int, last: int) -> list[float]:
    return [engine.train_step(make_batch(s), CrossEntropy(0.3), 1e-2).loss for s in range(first, last)]


def save_and_go_on(rank: int, folder: str, pp: int, dp: int, zero_stage: int) -> tuple[list[float], dict]:
    engine = build(pp, dp, zero_stage)
    steps(engine, 0, 2)
    save_checkpoint(engine, Path(folder), 2, {"note": 1.5}, keep=2)
    return steps(engine, 2, 4), engine.full_state()


def load_and_go_on(rank: int, folder: str, pp: int, dp: int, zero_stage: int) -> tuple[list[float], dict]:
    engine = build(pp, dp, zero_stage, seed=7)
    assert load_checkpoint(engine, list_checkpoints(Path(folder))[-1]) == {"step": 2, "note": 1.5}
    return steps(engine, 2, 4), engine.full_state()


@pytest.mark.parametrize(("pp", "dp", "zero_stage"), [(3, 1, 0), (1, 2, 1), (1, 2, 0)])
def test_resume_in_the_same_layout_is_bit_identical(tmp_path, pp, dp, zero_stage):
    unbroken = run_ranks(save_and_go_on, pp * dp, str(tmp_path), pp, dp, zero_stage)[0]
    resumed = run_ranks(load_and_go_on, pp * dp, str(tmp_path), pp, dp, zero_stage)[0]
    assert resumed[0] == unbroken[0]
    for name, tensor in unbroken[1].items():
        assert torch.equal(tensor, resumed[1][name]), name


def test_resume_in_another_layout_goes_on_with_the_same_losses(tmp_path):
    unbroken = run_ranks(save_and_go_on, 3, str(tmp_path), 3, 1, 0)[0]
    for pp, dp, zero_stage in ((1, 2, 1), (2, 1, 0)):
        resumed = run_ranks(load_and_go_on, pp * dp, str(tmp_path), pp, dp, zero_stage)[0]
        torch.testing.assert_close(resumed[0], unbroken[0], rtol=1e-5, atol=0)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    engine = build()
    path = save_checkpoint(engine, tmp_path, 1, {}, keep=1)
    victim = next(path.glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=victim.name):
        load_checkpoint(engine, path)


def test_only_the_newest_are_kept_and_leftovers_are_not_checkpoints(tmp_path):
    engine = build()
    for step in (1, 2, 3):
        save_checkpoint(engine, tmp_path, step, {}, keep=2)
    (tmp_path / ".step_00000009.partial").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_weights_change_when_training_and_not_when_evaluating():
    engine = build()
    before = engine.full_state()
    engine.evaluate(make_batch(0), CrossEntropy(0.3))
    assert all(torch.equal(t, before[n]) for n, t in engine.full_state().items())
    steps(engine, 0, 1)
    assert any(not torch.equal(t, before[n]) for n, t in engine.full_state().items())
