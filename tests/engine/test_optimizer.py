"""Learning-rate schedules and the global norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.config import OptimizerConfig
from ray_pipeline.engine.optimizer import build_optimizer, clip_by_global_norm, learning_rate


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 50), st.integers(1, 500), st.data())
def test_rate_stays_between_zero_and_the_peak(schedule, warmup, steps, data):
    config = OptimizerConfig(lr=2.0, warmup_steps=warmup, schedule=schedule)
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate(config, step, steps) <= 2.0
    if step + 1 < min(warmup, steps):
        assert learning_rate(config, step, steps) < learning_rate(config, step + 1, steps)


def test_cosine_falls_to_the_floor_and_wsd_is_flat_before_it_decays():
    cosine = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(cosine, 10, 100) == 1.0
    assert learning_rate(cosine, 55, 100) == pytest.approx(0.55)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.1)
    wsd = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.0)
    assert [learning_rate(wsd, s, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(wsd, 90, 100) == pytest.approx(0.5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0.01, 10))
def test_clipping_equals_torchs(values, limit):
    ours, theirs = torch.tensor(values), torch.tensor(values).requires_grad_()
    theirs.grad = ours.clone()
    expected = torch.nn.utils.clip_grad_norm_([theirs], limit)
    norm = clip_by_global_norm({"w": ours}, limit, Mesh(MeshSizes()))
    assert norm == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(200_000,), (800, 250), (8, 100, 250)])
def test_the_norm_of_many_small_numbers_and_a_large_one_is_exact(shape):
    gradient = torch.full(shape, 1e-4)
    gradient.view(-1)[0] = 1.0
    norm = clip_by_global_norm({"w": gradient}, 1e9, Mesh(MeshSizes()))
    assert norm == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def test_norm_weights_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4))
    named = dict(model.named_parameters())
    matrices, vectors = build_optimizer(named, OptimizerConfig(weight_decay=0.3), Mesh(MeshSizes())).param_groups
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
    assert len(matrices["params"]) == 1 and len(vectors["params"]) == 2


def test_sgd_takes_the_gradient_as_it_is():
    model = torch.nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    settings = OptimizerConfig(name="sgd", lr=1.0, weight_decay=0.3)
    optimizer = build_optimizer({"weight": model.weight}, settings, Mesh(MeshSizes()))
    model.weight.grad = torch.full((4, 4), 0.25)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.25)
