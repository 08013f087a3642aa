"""Experts' products over sorted rows, and their backward in two halves."""

from __future__ import annotations

import pytest
import torch

from model.layers.linear import deferred_weight_gradients, separable_backward
from model.moe.experts import _products, _weight_gradient, grouped_linear
from model.moe.rows import collect, plan_rows, spread

COUNTS = [3, 0, 4, 1]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(COUNTS), 8, 16, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(COUNTS)


def one_by_one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows @ matrix.t() for rows, matrix in zip(x.split(COUNTS), weight, strict=True)])


def test_grouped_linear_equals_one_expert_after_the_other():
    x, weight, counts = tensors()
    y, other, _ = tensors()
    grouped_linear(x, weight, counts).square().sum().backward()
    one_by_one(y, other).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(weight.grad, other.grad)


@pytest.mark.parametrize("bf16", [False, True])
def test_weight_gradients_of_experts_can_wait(bf16):
    x, weight, counts = tensors()
    y, other, _ = tensors()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with separable_backward():
            out = grouped_linear(x, weight, counts)
        with deferred_weight_gradients() as queue:
            out.float().square().sum().backward()
        grouped_linear(y, other, counts).float().square().sum().backward()
    assert weight.grad is None and len(queue) == 1
    assert torch.equal(x.grad, y.grad)
    queue.run()
    assert torch.equal(weight.grad, other.grad) and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("later", [False, True])
def test_tokens_spread_by_the_experts_are_as_tokens_spread_before(later, multiple):
    """The same bits, and what is kept is the tokens, not their rows."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(4, (6, 2), generator=generator)
    plan = plan_rows(chosen, 4, multiple)
    tokens = torch.randn(6, 16, generator=generator)
    found = []
    for spreads in (True, False):
        x, (_, weight, _) = tokens.clone().requires_grad_(), tensors()
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with separable_backward(), hooks:
            args = (x, weight, plan.counts, plan) if spreads else (spread(x, plan), weight, plan.counts)
            out = grouped_linear(*args)
        if spreads:
            assert sorted(kept) == [tokens.numel(), weight.numel()]
        real = collect(out, plan).square().sum()
        if later:
            with deferred_weight_gradients() as queue:
                real.backward()
            queue.run()
        else:
            real.backward()
        found.append((out, x.grad, weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_frozen_experts_cost_no_weight_gradient():
    x, weight, counts = tensors()
    weight.requires_grad_(False)
    with deferred_weight_gradients() as queue:
        grouped_linear(x, weight, counts).sum().backward()
    assert len(queue) == 0 and weight.grad is None and x.grad is not None


def test_the_grouped_kernel_and_the_loop_agree():
    """The GPU's path, with the same kernel's CPU form: offsets instead of counts."""
    x, weight, counts = (t.detach() for t in tensors(torch.bfloat16))
    ends = counts.cumsum(0).to(torch.int32)
    y = _products(x, weight.transpose(1, 2), ends)
    torch.testing.assert_close(y, _products(x, weight.transpose(1, 2), COUNTS))
    torch.testing.assert_close(_products(y, weight, ends), _products(y, weight, COUNTS))
    torch.testing.assert_close(_weight_gradient(y, x, ends), _weight_gradient(y, x, COUNTS))
