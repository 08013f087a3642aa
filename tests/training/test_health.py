"""Training that blows up: told with its likeliest cause, kept in no checkpoint, and never a dead end."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.checkpoints.checkpoint import load_checkpoint, step_name
from ray_pipeline.engine.checkpoints.checkpoint_writer import CheckpointWriter
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.engine.step_stats import StepStats
from ray_pipeline.errors import UserError
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.training import health
from ray_pipeline.training.health import LARGEST_WEIGHT, Health, weights_problem
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, make_batch
from tests.training.test_trainer import checkpoints, commands, copied, fit, names, run_move, unbroken

__all__ = ["copied", "unbroken"]  # fixtures


def build(**options: Any) -> Engine:
    return Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=OPTIMIZER, micro_batch=2, **options))


def spoil(folder: Path, step: int, value: float) -> None:
    """The checkpoint of a step with one weight that blew up, as a run that did not look would have kept it."""
    engine = build()
    page = load_checkpoint(engine, checkpoints(folder) / step_name(step))
    with torch.no_grad():
        engine.parts[0].lm_head.weight[3, 5] = value
    with CheckpointWriter(engine.mesh, checkpoints(folder), keep=9) as writer:
        writer.save(engine, step, page["extra"])


@pytest.mark.parametrize("value", [5e29, math.nan])
def test_a_checkpoint_that_blew_up_is_named_and_the_way_out_leads_to_the_same_weights(copied, unbroken, value):
    spoil(copied, 8, value)
    with pytest.raises(UserError, match=r"step_00000008: .*training had blown up before it was saved") as caught:
        fit(copied)
    said = str(caught.value)
    assert ("largest weight is 5e+29" if value > 0 else "not finite numbers") in said
    assert "The checkpoint of step 6 is healthy" in said
    *moves, resume = commands(said)
    assert resume == f"python -m ray_pipeline.cli resume toy --output-dir {copied}"
    for move in moves:
        run_move(move)
    resumed = fit(copied)
    assert (resumed["started"], resumed["digest"]) == (6, unbroken[1]["digest"])


def test_spoiled_and_damaged_ones_are_passed_over_down_to_a_healthy_one(copied, unbroken):
    kept = names(copied)
    for step in kept[1:]:
        spoil(copied, step, 1e9)
    with pytest.raises(UserError, match=f"The checkpoint of step {kept[0]} is healthy") as caught:
        fit(copied)
    for move in commands(str(caught.value))[:-1]:
        run_move(move)
    assert names(copied) == kept[:1]
    assert fit(copied)["digest"] == unbroken[1]["digest"]


def test_where_no_checkpoint_is_healthy_the_way_out_leads_to_the_beginning(copied, unbroken):
    for step in names(copied):
        spoil(copied, step, math.inf)
    with pytest.raises(UserError, match="No checkpoint is healthy") as caught:
        fit(copied)
    run_move(commands(str(caught.value))[0])
    assert fit(copied)["digest"] == unbroken[1]["digest"]


def test_weights_that_blow_up_in_the_last_step_are_neither_saved_nor_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "LARGEST_WEIGHT", 500.0)
    with pytest.raises(UserError) as caught:
        fit(tmp_path, steps=1, optimizer={"warmup_steps": 0, "lr": 1000.0, "weight_decay": 0.0})
    said = str(caught.value)
    assert "the largest weight is 1e+03, beyond 500" in said and "after step 1, and are not saved" in said
    assert "Lower pretrain.optimizer.lr (1000)" in said and "There is no checkpoint yet" in said
    assert names(tmp_path) == []
    assert not (checkpoints(tmp_path).parent / "metrics.jsonl").read_text().count("val/")


def test_a_run_whose_rate_is_absurd_is_told_that_and_keeps_healthy_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "LARGEST_WEIGHT", 500.0)
    with pytest.raises(UserError, match=r"rate is the likeliest cause.*--set pretrain\.optimizer\.lr="):
        fit(tmp_path, optimizer={"warmup_steps": 8, "lr": 1000.0}, checkpoint_every=1, eval_every=8)
    engine = build()
    assert names(tmp_path)
    for step in names(tmp_path):
        load_checkpoint(engine, checkpoints(tmp_path) / step_name(step))
        assert weights_problem(engine) is None


def watcher(folder: Path, *, start: int = 0, precision: str = "fp32", losses: tuple[float, ...] = ()) -> Health:
    pretrain = {"precision": precision, "optimizer": {"lr": 3e-3}}
    settings = PipelineFields.model_validate({"pretrain": pretrain}).pretrain
    mesh = Mesh(MeshSizes())
    rank: Any = SimpleNamespace(stage="pretrain", settings=settings, mesh=mesh, folder=folder / "toy" / "pretrain-0")
    watched = Health(rank, build(), checkpoints(folder))
    watched.check_start(start)
    for step, loss in enumerate(losses, start=1):
        watched.check_step(step, stats(loss), make_batch(step))
    return watched


def stats(loss: float, norm: float = 1.0) -> StepStats:
    return StepStats(loss, norm, 1.0, {})


FALLING = tuple(6.0 - 0.1 * i for i in range(20))
CAUSES = {
    "rate": ((6.0, 4.0, 5.5, 9.0), stats(math.nan), {}, "had risen from 4 at step 2 to 9 at step 4, so the rate"),
    "young": ((6.0, 5.9), stats(math.nan, math.inf), {}, "After so few steps the rate is the likeliest cause"),
    "first": ((), stats(math.nan), {}, "No step was taken before it, so the rate is not the cause"),
    "sudden": (FALLING, stats(math.nan), {}, r"had not risen before \(last 4.1\), so a single batch or a fault"),
    "overflow": (FALLING, stats(4.0, math.inf), {"precision": "fp8"}, r"overflowed in fp8: use --set .*precision=bf16"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_likeliest_cause_is_named(tmp_path, name):
    losses, failed, more, said = CAUSES[name]
    watched = watcher(tmp_path, losses=losses, **more)
    with pytest.raises(UserError, match=said) as caught:
        watched.check_step(len(losses) + 1, failed, make_batch(0))
    told = f"step {len(losses) + 1}: the loss is {failed.loss:g} and the gradient norm {failed.grad_norm:g}"
    assert told in str(caught.value)


def test_numbers_that_a_batch_brought_are_the_cause(tmp_path):
    batch = make_batch(0)
    batch.extras.teacher_hidden = torch.full((8, 16, 2), math.inf)
    with pytest.raises(UserError, match=r"Its batch brought numbers that are not finite \(teacher_hidden\)"):
        watcher(tmp_path, losses=(9.0, 99.0)).check_step(3, stats(math.nan), batch)


def test_after_a_failure_the_newest_checkpoint_and_the_next_time_the_one_before_is_offered(copied):
    fresh = watcher(copied)
    with pytest.raises(UserError, match="The checkpoint of step 8 is healthy; this goes on from it") as caught:
        fresh.check_step(9, stats(math.nan), make_batch(0))
    assert commands(str(caught.value)) == [fresh.resume]
    again = watcher(copied, start=8)
    with pytest.raises(UserError, match="from the checkpoint of step 8.*that of step 6, put it aside") as caught:
        again.check_step(9, stats(math.nan), make_batch(0))
    move, resume = commands(str(caught.value))
    run_move(move)
    assert names(copied)[-1] == 6 and resume == again.resume
    for path in set(checkpoints(copied).glob("step_*")) - {checkpoints(copied) / "step_00000006"}:
        shutil.rmtree(path)
    with pytest.raises(UserError, match="there is no older one"):
        watcher(copied, start=6).check_step(7, stats(math.nan), make_batch(0))


def test_given_weights_that_are_spoiled_are_not_trained_from(tmp_path):
    watched = watcher(tmp_path)
    with torch.no_grad():
        watched.engine.parts[0].norm.weight[0] = math.nan
    with pytest.raises(UserError, match="pretrain: weights are not finite numbers in the model it starts from"):
        watched.check_start(0)


SIZES = [(MeshSizes(dp=2), 0), (MeshSizes(dp=2), 1), (MeshSizes(dp=2), 2), (MeshSizes(dp=2), 3), (MeshSizes(pp=2), 0),
         (MeshSizes(tp=2), 0), (MeshSizes(dp=2, ep=2), 1)]  # fmt: skip


def seen(rank: int) -> list[list[str | None]]:
    """What every rank says of weights that are well, of one that is large, and of moments that overflowed."""
    torch.set_num_threads(1)
    out = []
    for sizes, zero_stage in SIZES:
        engine = Engine(CONFIG, Mesh(sizes), EngineOptions(optimizer=OPTIMIZER, zero_stage=zero_stage, micro_batch=2))
        engine.train_step(make_batch(0), CrossEntropy(0.3), 1e-3)
        told = [weights_problem(engine)]
        state = {key: tensor.clone() for key, tensor in engine.state().items()}
        for key, value in (("model.norm.weight", 2 * LARGEST_WEIGHT), ("exp_avg_sq.norm.weight", math.inf)):
            changed = {name: tensor.clone() for name, tensor in state.items()}
            if key in changed:  # the last stage alone has it
                changed[key][1] = value
            engine.load_state(changed)
            told.append(weights_problem(engine))
        out.append(told)
    return out


def test_every_rank_knows_of_a_number_that_any_of_them_holds():
    for told in run_ranks(seen, 2):
        for well, large, moments in told:
            assert well is None and "largest weight is 1.31e+05" in large and "averages of gradients" in moments


def nan_losses(rank: int) -> list[float]:
    torch.set_num_threads(1)
    out = []
    for stage in (1, 2, 3):
        engine = Engine(
            CONFIG, Mesh(MeshSizes(dp=2)), EngineOptions(optimizer=OPTIMIZER, zero_stage=stage, micro_batch=2)
        )
        state = {key: tensor.clone() for key, tensor in engine.state().items()}
        state["model.norm.weight"][0] = math.nan
        engine.load_state(state)
        found = engine.train_step(make_batch(0), CrossEntropy(0.3), 1e-3)
        out.append(found.grad_norm)
    return out


def test_a_norm_that_is_no_number_is_told_under_every_zero_stage():
    for norms in run_ranks(nan_losses, 2):
        assert not any(math.isfinite(norm) for norm in norms), norms
