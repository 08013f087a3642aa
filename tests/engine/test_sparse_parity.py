"""Sparse attention takes the same steps in every layout, in its dense warm-up and after it, its indexer's too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.attention.sparse import set_warm_up
from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from tests.distributed import run_ranks
from tests.engine.test_parity import CONFIG, OPTIMIZER, SGD, STEPS, Case, Outcome, assert_equal, case, make_batch

SPARSE = replace(CONFIG, attention="dsa", index_n_heads=6, index_head_dim=8, index_topk=5)


def train(case: Case) -> tuple[Outcome, list[float]]:
    """Half of the steps dense. Returns also the indexers' mean divergence of every step."""
    torch.set_num_threads(1)
    mesh, settings = Mesh(case.sizes), SGD if case.optimizer == "sgd" else OPTIMIZER
    engine = Engine(
        SPARSE,
        mesh,
        EngineOptions(optimizer=settings, precision=case.precision, micro_batch=case.micro_batch, **dict(case.options)),
    )
    objective, stats = CrossEntropy(mtp_weight=0.3), []
    for step in range(STEPS):
        set_warm_up(engine.module, step < STEPS // 2)
        stats.append(engine.train_step(make_batch(step), objective, settings.lr))
    loads = {name: load for part in all_ranks_gather(mesh, engine.expert_loads) for name, load in part.items()}
    outcome = Outcome([s.loss for s in stats], [s.grad_norm for s in stats], engine.full_state(), loads)
    return outcome, [s.figures["indexer_kl"] for s in stats]


def train_all(rank: int, cases: list[Case]) -> list[tuple[Outcome, list[float]]] | None:
    outcomes = [train(case) for case in cases]
    return outcomes if rank == 0 else None


CASES = {
    2: [
        case(tp=2, optimizer="sgd"), case(sp=2, optimizer="sgd"), case(pp=2, schedule="zbv", optimizer="sgd"),
        case(dp=2, zero_stage=3), case(tp=2, activation_checkpointing="full", optimizer="sgd"),
        case(sp=2, activation_checkpointing="selective", zero_stage=2), case(sp=2, precision="bf16"),
    ],
    4: [
        case(sp=2, tp=2, optimizer="sgd"), case(pp=2, dp=2, ep=2, zero_stage=2, optimizer="sgd"),
        case(sp=4, ep=4, zero_stage=1, optimizer="sgd"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def references():
    wanted = {(c.optimizer, c.precision) for cases in CASES.values() for c in cases}
    return {(o, p): train(Case(optimizer=o, precision=p)) for o, p in wanted}


@pytest.fixture(scope="module")
def outcomes():
    return {world: run_ranks(train_all, world, cases)[0] for world, cases in CASES.items()}


@pytest.mark.parametrize(("world", "index"), [(w, i) for w, cases in CASES.items() for i in range(len(cases))],
                         ids=[str(c) for cases in CASES.values() for c in cases])  # fmt: skip
def test_layout_equals_one_process(references, outcomes, world, index):
    case = CASES[world][index]
    (got, divergence), (want, wanted) = outcomes[world][index], references[case.optimizer, case.precision]
    assert_equal(got, want, case)
    # As far as the weights are equal: see `assert_equal`.
    rtol = 2e-2 if case.precision == "bf16" else 1e-5 if case.optimizer == "sgd" else 1e-3
    torch.testing.assert_close(divergence, wanted, rtol=rtol, atol=0)


def test_the_indexer_is_trained_in_both_phases(references):
    outcome, divergence = references["sgd", "fp32"]
    assert all(value > 0 for value in divergence)
    fresh = Engine(SPARSE, Mesh(Case().sizes)).full_state()
    moved = {name for name, tensor in outcome.weights.items() if not torch.equal(tensor, fresh[name])}
    assert {name for name in fresh if ".indexer." in name} <= moved
