"""Learning-rate schedules and the global norm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.optimizer import build_optimizer, clipped_step, global_norm, learning_rate, set_rate
from ray_pipeline.settings.schema import OptimizerConfig


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 50), st.integers(1, 500), st.data())
def test_rate_stays_between_zero_and_the_peak(schedule, warmup, steps, data):
    config = OptimizerConfig(lr=2.0, warmup_steps=warmup, schedule=schedule)
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate(config, step, steps) <= 2.0
    if step + 1 < config.warm_up(steps):
        assert learning_rate(config, step, steps) < learning_rate(config, step + 1, steps)


def test_cosine_falls_to_the_floor_and_wsd_is_flat_before_it_decays():
    cosine = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(cosine, 10, 100) == 1.0
    assert learning_rate(cosine, 55, 100) == pytest.approx(0.55)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.1)
    wsd = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.0)
    assert [learning_rate(wsd, s, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(wsd, 90, 100) == pytest.approx(0.5)


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 10_000), st.integers(1, 300))
def test_every_run_reaches_its_rate(schedule, warmup, steps):
    config = OptimizerConfig(lr=2.0, warmup_steps=warmup, schedule=schedule, decay_fraction=0.2)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(2.0) and (warmup > steps or config.warm_up(steps) == warmup)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@settings(deadline=None)
@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=20).filter(lambda v: len(v) % 2 == 0),
    limit=st.floats(0.01, 10),
)
def test_a_clipped_step_is_that_of_gradients_that_torch_clipped(name, values, limit):
    config = OptimizerConfig(name=name, lr=0.1)
    start, gradient = torch.linspace(-1, 1, len(values)).view(2, -1), torch.tensor(values).view(2, -1)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one, other = (build_optimizer({"w": p}, config, Mesh(MeshSizes())) for p in (ours, theirs))
    for _ in range(2):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        norm = global_norm({"w": ours.grad}, Mesh(MeshSizes()))
        clipped_step(one, norm, limit)
        expected = torch.nn.utils.clip_grad_norm_([theirs], limit)
        other.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        gradient, limit = gradient.flip(0) - 1, 1e9  # the second step clips nothing, whatever the first one did


@pytest.mark.parametrize("shape", [(200_000,), (800, 250), (8, 100, 250)])
def test_the_norm_of_many_small_numbers_and_a_large_one_is_exact(shape):
    gradient = torch.full(shape, 1e-4)
    gradient.view(-1)[0] = 1.0
    norm = global_norm({"w": gradient}, Mesh(MeshSizes()))
    assert float(norm) == pytest.approx(float(gradient.double().norm()), rel=1e-6)


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


def test_embedding_head_and_vectors_have_rates_of_their_own_and_the_common_decay():
    names = ("embed_tokens.weight", "lm_head.weight", "layers.0.mlp.up_proj.weight", "norm.weight")
    named = {name: torch.nn.Parameter(torch.ones((4, 2) if name != "norm.weight" else 2)) for name in names}
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, embedding_lr_factor=20, head_lr_factor=0.5, vector_lr_factor=2)
    optimizer = build_optimizer(named, config, Mesh(MeshSizes()))
    set_rate(optimizer, 0.01)
    groups = {name: group for group in optimizer.param_groups for name in names if group["params"][0] is named[name]}
    assert [groups[name]["lr"] for name in names] == pytest.approx([0.2, 0.005, 0.01, 0.02])
    decays = [groups[name]["lr"] * groups[name]["weight_decay"] for name in names]
    assert decays == pytest.approx([0.003, 0.003, 0.003, 0.0])
    plain = build_optimizer(named, OptimizerConfig(), Mesh(MeshSizes()))
    assert [group["name"] for group in plain.param_groups] == ["matrices", "vectors"]
