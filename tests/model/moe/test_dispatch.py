"""Routed experts on other ranks: the same sums and gradients as on one, whichever way tokens take."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels.rows import plan_rows
from model.layers.fp8 import quantise_tiles
from model.moe.dispatch import _coded, _decoded, plan_present, round_gradients, round_tokens
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


def layer(mesh: Mesh | None = None, *, fp8: bool = False) -> MixtureOfExperts:
    """The same weights in every layout."""
    made, generator = MixtureOfExperts(CONFIG), torch.Generator().manual_seed(0)
    made.experts.fp8_dispatch = fp8
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
        for tokens, fp8 in product(TOKENS, (False, True)):
            x, grad = given(tokens)
            replica = mesh.axis("replica").index
            got = outcome(layer(mesh, fp8=fp8), x[replica], grad[replica])
            places = {name: (mesh.axis(name).index, mesh.axis(name).size) for name in ("ep", "tp")}
            group = mesh.axis("ep").size * (mesh.axis("replica").index // mesh.axis("ep").size)
            found.append({**got, "replica": replica, "first": group, "places": places})
    return found


@pytest.fixture(scope="module")
def outcomes() -> list[list[dict[str, Any]]]:
    return run_ranks(on_ranks, WORLD)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{sizes} node={node}" for sizes, node in CASES])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("fp8", [False, True])
def test_spread_experts_equal_those_on_one_rank(
    outcomes: list[list[dict[str, Any]]], case: int, tokens: int, fp8: bool
) -> None:
    x, grad = given(tokens)
    x, grad = list(x), list(grad)
    for rank in outcomes:
        got = rank[2 * (case * len(TOKENS) + TOKENS.index(tokens)) + fp8]
        ep, tp = got["places"]["ep"], got["places"]["tp"]
        alone = outcome(layer(fp8=fp8), x[got["replica"]], grad[got["replica"]])
        for name in ("out", "x", "router"):
            torch.testing.assert_close(got[name], alone[name], rtol=1e-5, atol=1e-6)
        members = range(got["first"], got["first"] + ep[1])  # an expert hears of every replica that shares it
        whole = outcome(layer(fp8=fp8), torch.cat([x[i] for i in members]), torch.cat([grad[i] for i in members]))
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


def rounded_by_formula(x: Tensor) -> Tensor:
    """Each 1 x 128 tile by the smallest power of two that brings it to 448 at most, to three bits of mantissa."""
    out = torch.empty_like(x)
    for row, start in product(range(x.shape[0]), range(0, x.shape[1], 128)):
        tile = x[row, start : start + 128]
        scale = 2.0 ** torch.ceil(torch.log2(tile.abs().max() / 448))
        values = tile / scale
        step = 2.0 ** (torch.floor(torch.log2(values.abs().clamp(min=2.0**-6))) - 3)
        out[row, start : start + 128] = torch.round(values / step) * step * scale
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_8_bits_are_those_of_the_formula_and_arrive_as_they_were_sent(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 7).to(dtype)
    rounded = round_tokens(x)
    assert rounded.dtype == dtype and torch.equal(rounded.float(), rounded_by_formula(x.float()))
    message = _coded(rounded)
    assert message.shape == (5, 300 + 4 * 3) and message.dtype == torch.uint8
    assert torch.equal(_decoded(message, rounded), rounded)
    assert torch.equal(_decoded(_coded(_decoded(message, rounded)), rounded), rounded)


def test_8_bits_round_what_goes_to_experts_and_not_what_comes_back() -> None:
    x, grad = (torch.randn(3, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for function, forward in ((round_tokens, True), (round_gradients, False)):
        given = x.clone().requires_grad_()
        out = function(given)
        out.backward(grad)
        assert torch.equal(out, x) is not forward and torch.equal(given.grad, grad) is forward
        changed = out if forward else given.grad
        assert torch.equal(changed, quantise_tiles(x if forward else grad).dequantise())
