"""Muon against torch's own, and against the formula; what it leaves to AdamW; the same in every legal layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.muon import (
    COEFFICIENTS,
    ITERATIONS,
    Muon,
    as_matrices,
    equalised,
    is_orthogonalised,
    orthogonalise,
)
from ray_pipeline.engine.optimizer import build_optimizer
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, make_batch

SETTINGS = OptimizerConfig(name="muon", lr=1e-2, warmup_steps=0, grad_clip=0.5)
NEWER = OptimizerConfig(
    name="muon", lr=1e-2, warmup_steps=0, grad_clip=0.5, muon_iteration="polar_express", muon_equalise=True,
    cautious_decay=True, embedding_lr_factor=5.0, head_lr_factor=0.5, vector_lr_factor=2.0,
)  # fmt: skip
SHAPES = [(16, 16), (48, 16), (16, 80)]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.weight": nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(SHAPES)}


def test_steps_equal_those_of_torchs_muon():
    ours, theirs = parameters(), parameters()
    groups = [{"params": list(ours.values()), "names": list(ours), "muon": True, "weight_decay": 0.1}]
    muon = Muon(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, momentum=0.9, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for (name, mine), other in zip(ours.items(), theirs.values(), strict=True):
            gradient = torch.randn(mine.shape, generator=torch.Generator().manual_seed(100 * step + int(name[0])))
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        muon.step()
        torchs.step()
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 48, 16), (3, 16, 48)])
def test_singular_values_are_pushed_towards_one_and_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonalise(matrices, torch.float64)
    u, values, vh = torch.linalg.svd(matrices / matrices.norm(dim=(-2, -1), keepdim=True), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(got, u @ torch.diag_embed(values) @ vh, rtol=1e-9, atol=1e-9)
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_brings_singular_values_closer_to_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    farthest = {
        name: (torch.linalg.svdvals(orthogonalise(matrix, torch.float64, name)) - 1).abs().max() for name in ITERATIONS
    }
    assert farthest["polar_express"] < 0.15 < farthest["newton_schulz"]


def test_neurons_take_steps_of_one_size_and_the_norm_stays():
    update = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 13)[:, None]
    squares = torch.zeros_like(update)
    got = equalised(update, squares)
    torch.testing.assert_close(got.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    rows = got.square().mean(2)
    torch.testing.assert_close(rows, rows.mean(1, keepdim=True).expand_as(rows))
    torch.testing.assert_close(squares, 0.05 * update.square().mean(2, keepdim=True).expand_as(update))
    across = equalised(update.mT.contiguous(), torch.zeros_like(update.mT))
    torch.testing.assert_close(across, got.mT)


def test_cautious_decay_shrinks_only_what_the_step_shrinks_too():
    decayed, plain = (parameters() for _ in range(2))
    for named, decay in ((decayed, 0.5), (plain, 0.0)):
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 + int(name[0])))
        groups = [{"params": list(named.values()), "names": list(named), "muon": True, "weight_decay": decay}]
        Muon(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, momentum=0.9, cautious=True).step()
    for name, p in decayed.items():
        agrees = (before[name] - plain[name]) * before[name] >= 0
        assert 0 < agrees.float().mean() < 1
        torch.testing.assert_close(plain[name] - p, 0.1 * 0.5 * before[name] * agrees, rtol=1e-4, atol=1e-6)


def test_experts_in_a_stack_are_orthogonalised_one_by_one_gate_and_up_apart():
    stack = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))  # gate rows, then up rows
    together = orthogonalise(as_matrices("layers.1.mlp.experts.gate_up_proj", stack), torch.float32).view(3, 8, 6)
    for expert in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            alone = orthogonalise(stack[expert, half], torch.float32)
            torch.testing.assert_close(together[expert, half], alone, rtol=1e-5, atol=1e-6)
    assert as_matrices("layers.1.mlp.experts.down_proj", stack) is stack


def test_a_matrix_without_a_gradient_does_not_become_nan():
    assert torch.equal(orthogonalise(torch.zeros(4, 6), torch.float32), torch.zeros(4, 6))


def test_embedding_head_router_norms_and_scales_are_left_to_adamw():
    config = ModelConfig(norm="dyt", recursion_depth=2)
    with torch.device("meta"):
        named = dict(Transformer(config).named_parameters())
    left = {name for name, parameter in named.items() if not is_orthogonalised(name, parameter)}
    tables = {"embed_tokens.weight", "lm_head.weight", "recursion.weight"}
    routers = {name for name in named if name.endswith("mlp.gate.weight")}
    assert left == tables | routers | {name for name, parameter in named.items() if parameter.dim() == 1}
    groups = {group["name"]: group for group in build_optimizer(named, SETTINGS, Mesh(MeshSizes())).param_groups}
    assert groups["muon"]["names"] == [name for name in named if name not in left]
    assert len(groups["matrices"]["params"]) == 2 + len(routers) and groups["vectors"]["weight_decay"] == 0


def train(
    sizes: MeshSizes, steps: int = 3, settings: OptimizerConfig = SETTINGS, **options
) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    engine = Engine(CONFIG, Mesh(sizes), EngineOptions(optimizer=settings, micro_batch=2, **options))
    losses = [engine.train_step(make_batch(step), CrossEntropy(0.3), SETTINGS.lr).loss for step in range(steps)]
    return losses, engine.full_state()


LAYOUTS = [(MeshSizes(dp=2, ep=2), {}), (MeshSizes(sp=2), {}), (MeshSizes(pp=2), {"schedule": "zbv"})]


def train_all(rank: int) -> list:
    return [(settings, train(sizes, settings=settings, **o)) for settings in (SETTINGS, NEWER) for sizes, o in LAYOUTS]


def test_layouts_take_the_same_steps_as_one_process():
    references = [(settings, train(MeshSizes(), settings=settings)) for settings in (SETTINGS, NEWER)]
    for settings, (got_losses, got) in run_ranks(train_all, 2)[0]:
        losses, weights = next(outcome for of, outcome in references if of == settings)
        torch.testing.assert_close(got_losses, losses, rtol=2e-6, atol=0)
        for name, tensor in got.items():
            difference = (tensor - weights[name]).norm() / weights[name].norm().clamp(min=1e-6)
            assert difference < 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize("settings", [SETTINGS, NEWER], ids=["newton_schulz", "polar_express"])
def test_state_taken_over_by_another_engine_goes_on_bit_by_bit(settings):
    whole, _ = train(MeshSizes(), steps=4, settings=settings)
    engine = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=settings, micro_batch=2))
    for step in range(2):
        engine.train_step(make_batch(step), CrossEntropy(0.3), SETTINGS.lr)
    state = {key: tensor.clone() for key, tensor in engine.state().items()}
    assert ("neuron_squares.layers.1.mlp.experts.down_proj" in state) == settings.muon_equalise
    assert "momentum_buffer.layers.1.mlp.experts.down_proj" in state and "exp_avg.norm.weight" in state
    other = Engine(CONFIG, Mesh(MeshSizes()), EngineOptions(optimizer=settings, micro_batch=2, seed=5))
    other.load_state(state)
    assert [other.train_step(make_batch(s), CrossEntropy(0.3), SETTINGS.lr).loss for s in (2, 3)] == whole[2:]
