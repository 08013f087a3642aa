"""Experts' feed-forwards as one node: equal to one expert after the other, in every form of forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.kernels.cpu.expert_loop import experts as loop
from model.kernels.cuda.grouped_experts import experts as grouped
from model.kernels.rows import plan_rows
from model.kernels.weight_gradients import BackwardSplit

TOKENS, HIDDEN, INNER, EXPERTS = 6, 16, 8, 4


def tensors(dtype: torch.dtype = torch.float32, idle: int | None = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens, both parameters and the choices' weights, all leaves, and the choices; `idle` gets no token."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, HIDDEN), (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER), (TOKENS, 2)
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    if idle is not None:
        scores[:, idle] = -1.0
    return leaves, scores.topk(2).indices


def one_by_one(x, gate_up, down, weights, chosen):
    """eq. 12 as it is written."""
    out = torch.zeros_like(x)
    for token, choice in ((t, k) for t in range(len(x)) for k in range(chosen.shape[1])):
        expert = chosen[token, choice]
        gate, up = (gate_up[expert] @ x[token]).chunk(2)
        out[token] += weights[token, choice] * (down[expert] @ (F.silu(gate) * up))
    return out


def ours(leaves, chosen, multiple: int = 1, bf16: bool = False, split: BackwardSplit | None = None):
    x, *others = leaves
    return loop(x.bfloat16() if bf16 else x, *others, plan_rows(chosen, EXPERTS, multiple), split)


@pytest.mark.parametrize("multiple", [1, 4])
def test_experts_equal_one_after_the_other(multiple):
    (leaves, chosen), (others, _) = tensors(torch.float64), tensors(torch.float64)
    found, expected = ours(leaves, chosen, multiple), one_by_one(*others, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-10)
    assert not leaves[1].grad[2].any() and not leaves[2].grad[2].any()  # the idle expert


@pytest.mark.parametrize("bf16", [False, True])
def test_weight_gradients_of_experts_can_wait(bf16):
    (leaves, chosen), (others, _), split = tensors(), tensors(), BackwardSplit()
    with split.deferred() as queue:
        ours(leaves, chosen, 4, bf16, split).float().square().sum().backward()
    ours(others, chosen, 4, bf16).float().square().sum().backward()
    assert leaves[1].grad is None and leaves[2].grad is None and len(queue) == 2
    for i in (0, 3):
        assert torch.equal(leaves[i].grad, others[i].grad)
    queue.run()
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.dtype == torch.float32


@pytest.mark.parametrize("bf16", [False, True])
def test_tokens_are_kept_and_neither_their_rows_nor_the_inner_activations(bf16):
    leaves, chosen = tensors()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    plan = plan_rows(chosen, EXPERTS, 4)
    rows = len(plan.source)
    assert rows > TOKENS * 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(leaves, chosen, 4, bf16)
    matrices = leaves[1].numel(), leaves[2].numel()
    plans = [rows, rows, TOKENS * 2]  # each row's weight and token; the places of the choices
    assert sorted(kept) == sorted([TOKENS * HIDDEN, *matrices, rows * 2 * INNER, *plans])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (3,)])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(frozen):
    (leaves, chosen), (others, _), split = tensors(), tensors(), BackwardSplit()
    for i in frozen:
        leaves[i].requires_grad_(False)
    with split.deferred() as queue:
        ours(leaves, chosen, split=split).square().sum().backward()
    assert len(queue) == 2 - len({1, 2} & set(frozen))
    queue.run()
    ours(others, chosen).square().sum().backward()
    for i, (a, b) in enumerate(zip(leaves, others, strict=True)):
        assert a.grad is None if i in frozen else torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("idle", [None, 2])
def test_the_grouped_kernel_and_the_loop_agree(idle):
    """The GPU's form, with the same kernel's CPU form."""
    found = []
    for form in (grouped, loop):
        leaves, chosen = tensors(torch.bfloat16, idle)
        out = form(*leaves, plan_rows(chosen, EXPERTS))
        out.float().square().sum().backward()
        found.append((out, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
