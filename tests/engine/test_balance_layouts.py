"""Balancing losses, V2's routers, DyT, recursion, scales, value embeddings: every layout takes one process's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.settings.schema import OptimizerConfig
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, make_batch

SGD = OptimizerConfig(name="sgd", lr=0.5, warmup_steps=0, grad_clip=0.5)  # Adam would hide a wrong gradient scale
SOFTMAX = {"scoring_func": "softmax", "routed_scaling_factor": 2.0}
KINDS = {
    "sequence": {"aux_loss_alpha": 0.5},
    "batch": {"aux_loss_alpha": 0.5, "seq_aux": False, "topk_method": "greedy", **SOFTMAX},
    "groups": {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "aux_loss_alpha": 0.5,
        "norm_topk_prob": False, **SOFTMAX,
    },
    "dyt": {"norm": "dyt"},
    "recursion": {"recursion_depth": 3, "aux_loss_alpha": 0.5},
    "scales": {"residual_scales": True},
    "values": {"value_embeddings": True},
    "values of one head": {"value_embeddings": True, "attention": "mqa", "head_dim": 8},
    "values of groups": {"value_embeddings": True, "attention": "gqa", "num_key_value_heads": 2, "head_dim": 8},
    "scales alone": {"residual_scales": True, "num_nextn_predict_layers": 0},
}  # fmt: skip
LAYOUTS = {
    "tp2": (MeshSizes(tp=2), {}),
    "sp2": (MeshSizes(sp=2), {}),
    "dp2-ep2": (MeshSizes(dp=2, ep=2), {}),
    "pp2-zbv": (MeshSizes(pp=2), {"schedule": "zbv"}),
    "dp2-ep2-zero1": (MeshSizes(dp=2, ep=2), {"zero_stage": 1}),
    "sp2-zero2-full": (MeshSizes(sp=2), {"zero_stage": 2, "activation_checkpointing": "full"}),
    "dp2-zero3": (MeshSizes(dp=2), {"zero_stage": 3}),
}
RUN = {
    "sequence": ("tp2", "sp2", "pp2-zbv", "dp2-ep2-zero1", "sp2-zero2-full"),
    "batch": ("sp2", "dp2-ep2", "pp2-zbv"),
    "groups": ("dp2-ep2", "dp2-zero3"),
    "dyt": ("tp2", "sp2", "pp2-zbv", "dp2-zero3"),
    "recursion": ("tp2", "dp2-ep2-zero1", "sp2-zero2-full", "dp2-zero3"),
    "scales": ("tp2", "sp2", "pp2-zbv", "sp2-zero2-full", "dp2-zero3"),
    "scales alone": ("pp2-zbv",),
    "values": ("tp2", "sp2", "dp2-ep2-zero1", "pp2-zbv", "sp2-zero2-full", "dp2-zero3"),
    "values of one head": ("tp2", "sp2", "dp2-zero3"),
    "values of groups": ("tp2", "pp2-zbv"),
}
CASES = [(kind, name) for kind, names in RUN.items() for name in names]
STEPS = 2


# On four ranks; slow, and run alone: `-m slow`.
MORE = {
    "sp2-tp2": (MeshSizes(sp=2, tp=2), {}),
    "dp2-sp2-ep4-zero1": (MeshSizes(dp=2, sp=2, ep=4), {"zero_stage": 1}),
    "dp2-tp2-ep2-zero3-full": (
        MeshSizes(dp=2, tp=2, ep=2), {"zero_stage": 3, "activation_checkpointing": "full"},
    ),
    "pp2-sp2-interleaved": (MeshSizes(pp=2, sp=2), {"schedule": "interleaved_1f1b"}),
}  # fmt: skip
MORE_CASES = [(k, name) for k in KINDS for name in MORE if not (k == "recursion" and name.startswith("pp"))]


def config_of(kind: str) -> ModelConfig:
    return replace(CONFIG, **KINDS[kind])


def train(kind: str, sizes: MeshSizes, micro_batch: int = 2, **options) -> dict:
    torch.set_num_threads(1)
    engine = Engine(config_of(kind), Mesh(sizes), EngineOptions(optimizer=SGD, micro_batch=micro_batch, **options))
    stats = [engine.train_step(make_batch(step), CrossEntropy(0.3), SGD.lr) for step in range(STEPS)]
    return {
        "losses": [s.loss for s in stats],
        "norms": [s.grad_norm for s in stats],
        "figures": [s.figures for s in stats],
        "weights": engine.full_state(),
    }


def train_all(rank: int) -> dict:
    return {(kind, name): train(kind, LAYOUTS[name][0], **LAYOUTS[name][1]) for kind, name in CASES}


def train_more(rank: int) -> dict:
    return {(kind, name): train(kind, MORE[name][0], **MORE[name][1]) for kind, name in MORE_CASES}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {kind: train(kind, MeshSizes()) for kind in KINDS}


@pytest.fixture(scope="module")
def outcomes() -> list[dict]:
    return run_ranks(train_all, 2)


def assert_equal(got: dict, want: dict) -> None:
    torch.testing.assert_close(got["losses"], want["losses"], rtol=2e-6, atol=0)
    torch.testing.assert_close(got["norms"], want["norms"], rtol=1e-4, atol=0)
    for mine, other in zip(got["figures"], want["figures"], strict=True):
        assert mine.keys() == other.keys()
        torch.testing.assert_close(list(mine.values()), list(other.values()), rtol=1e-5, atol=1e-7)
    assert got["weights"].keys() == want["weights"].keys()
    for name, tensor in got["weights"].items():
        torch.testing.assert_close(
            tensor, want["weights"][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layout_equals_one_process(alone, outcomes, kind, name):
    for rank in outcomes:  # figures are known to every rank
        assert_equal(rank[kind, name], alone[kind])


@pytest.fixture(scope="module")
def more_outcomes() -> list[dict]:
    return run_ranks(train_more, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), MORE_CASES)
def test_layout_of_four_ranks_equals_one_process(alone, more_outcomes, kind, name):
    for rank in more_outcomes:
        assert_equal(rank[kind, name], alone[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_recomputation_change_nothing(alone, kind):
    assert_equal(train(kind, MeshSizes(), micro_batch=8, activation_checkpointing="full"), alone[kind])


def test_the_losses_are_reported_and_nothing_is_dropped(alone):
    for kind in ("sequence", "groups", "recursion"):
        for figures in alone[kind]["figures"]:
            assert 0.5 < figures["aux_loss"] < CONFIG.n_routed_experts and figures["moe/dropped_tokens"] == 0
    first, *later = (figures["aux_loss"] for figures in alone["batch"]["figures"])
    assert first == 0 and all(0.5 < value < CONFIG.n_routed_experts for value in later)
    assert not any("aux_loss" in figures for figures in alone["dyt"]["figures"])


@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_the_loss_evens_out_the_load(kind):
    """The same model with hardly any and with some of the loss; the bias, if there is one, stands still."""

    def unevenness(alpha: float) -> float:
        changes = KINDS[kind] | {"aux_loss_alpha": alpha, "router_bias_update_rate": 0.0}
        config = replace(CONFIG, **changes, num_nextn_predict_layers=0, num_hidden_layers=2)
        engine = Engine(config, Mesh(MeshSizes()), EngineOptions(optimizer=OptimizerConfig(), micro_batch=32))
        batches = (make_batch(step, rows=32) for step in range(48))
        entropies = [engine.train_step(batch, CrossEntropy(), 3e-3).figures["moe/load_entropy"] for batch in batches]
        return 1 - sum(entropies[-16:]) / 16

    assert unevenness(0.03) < 0.5 * unevenness(1e-9)
