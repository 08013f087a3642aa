"""Gathers to experts' rows and back: nothing lost, gradients as autograd's own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.kernels.rows import collect, plan_rows, spread, spread_scales


def chosen(tokens: int, k: int, experts: int, seed: int) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(4, 9), st.sampled_from([1, 4, 64]), st.integers(0, 99))
def test_every_choice_has_a_row_of_its_own_among_its_experts_rows(tokens, k, experts, multiple, seed):
    choice = chosen(tokens, k, experts, seed)
    plan = plan_rows(choice, experts, multiple)
    assert plan.place.unique().numel() == tokens * k
    assert torch.equal(plan.source[plan.place], torch.arange(tokens)[:, None].expand(-1, k))
    ends = plan.counts.cumsum(0)
    assert torch.equal(torch.searchsorted(ends, plan.place, right=True), choice)
    assert (plan.counts % multiple == 0).all() and len(plan.source) == int(ends[-1])
    wanted = torch.bincount(choice.flatten(), minlength=experts)
    assert ((plan.counts >= wanted) & (plan.counts < wanted + multiple)).all()


@given(st.integers(1, 12), st.integers(1, 3), st.sampled_from([1, 8]), st.integers(0, 99))
def test_spread_and_collect_equal_plain_indexing_forward_and_backward(tokens, k, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = plan_rows(chosen(tokens, k, 4, seed), 4, multiple)
    x = torch.randn(tokens, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(tokens, k, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = collect(spread(x, plan) * spread_scales(scales, plan), plan)
    plain = (x[:, None] * scales[:, :, None]).sum(1)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    ours_grads = torch.autograd.grad(ours, (x, scales), grad)
    for a, b in zip(ours_grads, torch.autograd.grad(plain, (x, scales), grad), strict=True):
        torch.testing.assert_close(a, b)
