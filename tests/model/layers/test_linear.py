"""The matrix product and its backward in two halves."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.kernels.cpu import products
from model.kernels.weight_gradients import BackwardSplit
from model.layers.linear import Linear


def pair(seed: int = 0) -> tuple[Linear, nn.Linear]:
    """Ours, whose backward can be cut, and torch's, with equal weights."""
    torch.manual_seed(seed)
    ours = Linear(6, 4)
    ours.backward_split = BackwardSplit()
    theirs = nn.Linear(6, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return x, x.detach().clone().requires_grad_()


def test_same_start_and_same_bits_as_nn_linear():
    torch.manual_seed(3)
    ours = Linear(6, 4)
    torch.manual_seed(3)
    theirs = nn.Linear(6, 4, bias=False)
    assert torch.equal(ours.weight, theirs.weight) and ours.state_dict().keys() == theirs.state_dict().keys()
    (x, y) = inputs()
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("bf16", [False, True])
def test_both_halves_together_are_the_whole_backward(bf16):
    ours, theirs = pair()
    (x, y) = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for _ in range(2):  # gradients accumulate over micro-batches
            out = ours(x)
            reference = theirs(y)
            assert torch.equal(out, reference) and out.dtype == reference.dtype
            with ours.backward_split.deferred() as queue:
                out.float().square().sum().backward()
            before = None if ours.weight.grad is None else ours.weight.grad.clone()
            reference.float().square().sum().backward()
            assert len(queue) == 1
            torch.testing.assert_close(x.grad, y.grad)
            queue.run()
            assert len(queue) == 0 and (before is None or not torch.equal(before, ours.weight.grad))
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_graph_that_can_be_cut_goes_back_whole_if_it_is_not():
    ours, theirs = pair()
    (x, y) = inputs()
    out = ours(x)
    out.square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(x.grad, y.grad)


def test_the_weight_waits_and_the_rest_does_not():
    ours, _ = pair()
    norm = nn.LayerNorm(4)
    (x, _) = inputs()
    out = norm(ours(x))
    with ours.backward_split.deferred() as queue:
        out.square().sum().backward()
    assert ours.weight.grad is None and x.grad is not None and norm.weight.grad is not None
    queue.run()
    assert ours.weight.grad is not None


def test_recomputed_layers_can_wait_too():
    ours, theirs = pair()
    (x, y) = inputs()
    out = checkpoint(ours, x, use_reentrant=False)
    with ours.backward_split.deferred() as queue:
        out.square().sum().backward()
    assert ours.weight.grad is None and len(queue) == 1
    queue.run()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_what_one_model_puts_off_another_computes_at_once():
    (ours, _), (other, _) = pair(), pair()
    (x, _) = inputs()
    out = ours(x).sum() + other(x).sum()
    with ours.backward_split.deferred() as queue:
        out.backward()
    assert ours.weight.grad is None and len(queue) == 1
    queue.run()
    assert torch.equal(ours.weight.grad, other.weight.grad)


def test_frozen_weights_leave_no_work():
    ours, _ = pair()
    ours.weight.requires_grad_(False)
    (x, _) = inputs()
    out = ours(x)
    with ours.backward_split.deferred() as queue:
        out.sum().backward()
    assert len(queue) == 0 and ours.weight.grad is None and x.grad is not None


def test_what_waits_lets_go_of_its_inputs_when_done():
    ours, _ = pair()
    x, _ = inputs()
    inner = x * 2
    out = ours(inner)
    held = weakref.ref(inner)
    with ours.backward_split.deferred() as queue:
        out.square().sum().backward()
    del inner, out
    assert held() is not None
    queue.run()
    assert held() is None


def test_a_gradient_put_off_lies_in_memory_as_its_parameter(monkeypatch):
    """Of whatever library makes it: an optimizer's fused step reads both in the order of their bytes."""
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)
    ours = Linear(6, 40)
    ours.backward_split = BackwardSplit()
    x = torch.randn(200, 6)
    out = ours(x)
    with ours.backward_split.deferred() as queue:
        out.sum().backward()
    queue.run()
    assert ours.weight.grad.stride() == ours.weight.stride()
    torch.testing.assert_close(ours.weight.grad, x.sum(0).expand(40, 6))
