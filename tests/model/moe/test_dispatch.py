"""Routed experts on other ranks: the same sums and gradients as on one, whichever way tokens take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.rows import plan_rows
from model.moe.dispatch import plan_present
from model.moe.experts import MixtureOfExperts
from model.parallel.collectives import Arrivals
from model.parallel.mesh import Mesh, MeshSizes
from model.parallel.shard_plan import cut, shard_of
from tests.distributed import run_ranks

CONFIG = ModelConfig(
    hidden_size=16, moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
    n_shared_experts=1,
)  # fmt: skip
WORLD = 4
CASES: list[tuple[dict[str, int], int | None]] = [
    ({"dp": 4, "ep": 4}, None), ({"dp": 4, "ep": 4}, 2), ({"dp": 4, "ep": 4}, 1), ({"dp": 4, "ep": 2}, 2),
    ({"dp": 2, "tp": 2, "ep": 2}, None), ({"dp": 2, "tp": 2, "ep": 2}, 2), ({"sp": 2, "tp": 2, "ep": 2}, 3),
]  # fmt: skip
TOKENS = [1, 7, 32]  # of a replica; of one token no more than two nodes hear


def layer(mesh: Mesh | None = None) -> MixtureOfExperts:
    """The same weights in every layout."""
    made, generator = MixtureOfExperts(CONFIG), torch.Generator().manual_seed(0)
    ep, tp = ((0, 1), (0, 1)) if mesh is None else ((a.index, a.size) for a in (mesh.axis("ep"), mesh.axis("tp")))
    for name, parameter in made.named_parameters():
        whole = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = cut(whole, shard_of(name), tp=tp, ep=ep).clone()
    if mesh is not None:
        for module in made.modules():
            for axis in ("tp", "ep", "ep_near", "ep_far"):
                if hasattr(module, axis):
                    setattr(module, axis, mesh.axis(axis))
    return made


def given(tokens: int) -> tuple[Tensor, Tensor]:
    """What every replica reads, and the gradient of what it makes: [replicas, tokens, hidden]."""
    generator = torch.Generator().manual_seed(tokens)
    return (torch.randn(WORLD, tokens, CONFIG.hidden_size, generator=generator) for _ in range(2))  # type: ignore


def outcome(made: MixtureOfExperts, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = made(x.unsqueeze(0)).squeeze(0)
    out.backward(grad)
    experts = made.experts
    return {
        "out": out.detach(), "x": x.grad, "router": made.gate.weight.grad,
        "gate_up": experts.gate_up_proj.grad, "down": experts.down_proj.grad,
    }  # fmt: skip


def on_ranks(rank: int) -> list[dict[str, Any]]:
    found = []
    for sizes, node in CASES:
        mesh = Mesh(MeshSizes(**sizes), node=node)
        for tokens in TOKENS:
            x, grad = given(tokens)
            replica = mesh.axis("replica").index
            got = outcome(layer(mesh), x[replica], grad[replica])
            places = {name: (mesh.axis(name).index, mesh.axis(name).size) for name in ("ep", "tp")}
            group = mesh.axis("ep").size * (mesh.axis("replica").index // mesh.axis("ep").size)
            found.append({**got, "replica": replica, "first": group, "places": places})
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[list[dict[str, Any]]]:
    return run_ranks(on_ranks, WORLD)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{sizes} node={node}" for sizes, node in CASES])
@pytest.mark.parametrize("tokens", TOKENS)
def test_spread_experts_equal_those_on_one_rank(outcomes: list[list[dict[str, Any]]], case: int, tokens: int) -> None:
    x, grad = given(tokens)
    x, grad = list(x), list(grad)
    for rank in outcomes:
        got = rank[case * len(TOKENS) + TOKENS.index(tokens)]
        ep, tp = got["places"]["ep"], got["places"]["tp"]
        alone = outcome(layer(), x[got["replica"]], grad[got["replica"]])
        for name in ("out", "x", "router"):
            torch.testing.assert_close(got[name], alone[name], rtol=1e-5, atol=1e-6)
        members = range(got["first"], got["first"] + ep[1])  # an expert hears of every replica that shares it
        whole = outcome(layer(), torch.cat([x[i] for i in members]), torch.cat([grad[i] for i in members]))
        for name, of in (("gate_up", "experts.gate_up_proj"), ("down", "experts.down_proj")):
            want = cut(whole[name], shard_of(of), tp=tp, ep=ep)
            torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6)


def test_what_is_none_of_a_ranks_experts_shares_one_row_of_padding() -> None:
    plan = plan_present(torch.tensor([[0, 1, 2], [1, 2, 2], [2, 2, 2]]), held=2, multiple=1)
    assert plan.counts.tolist() == [1, 3] and plan.place.tolist() == [[0, 1, 3], [2, 3, 3], [3, 3, 3]]
    assert plan.source[:3].tolist() == [0, 0, 1]
    padded = plan_present(torch.tensor([[0, 2], [1, 0]]), held=2, multiple=4)
    assert padded.counts.tolist() == [4, 8] and padded.place.tolist() == [[0, 8], [4, 1]]


def test_a_rank_with_all_experts_plans_as_if_there_were_no_others() -> None:
    chosen = torch.randint(0, 4, (20, 2), generator=torch.Generator().manual_seed(0))
    for multiple in (1, 8):
        plan, plain = plan_present(chosen, 4, multiple), plan_rows(chosen, 4, multiple)
        assert torch.equal(plan.source, plain.source) and torch.equal(plan.place, plain.place)
        assert torch.equal(plan.counts, plain.counts)


def test_what_arrived_is_given_out_again_in_its_order_and_needless_values_as_zeros() -> None:
    arrivals, asked = Arrivals(), []

    def receive(value: float) -> Tensor:
        asked.append(value)
        return torch.full((2,), value)

    def layer_of(first: float, second: float) -> list[float]:
        kept = arrivals.keep(lambda: receive(first))
        return [*kept.tolist(), *arrivals.keep(lambda: receive(second), values=False).tolist()]

    assert layer_of(1.0, 2.0) == [1, 1, 2, 2]
    for _ in range(2):  # as often as backward asks
        arrivals.again()
        assert layer_of(3.0, 4.0) == [1, 1, 0, 0]
    assert asked == [1.0, 2.0]
