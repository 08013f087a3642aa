"""The loss without logits equals the loss of logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import limits
from model.kernels.weight_gradients import BackwardSplit
from model.layers.block_loss import label_losses, loss_of_logits
from model.layers.chunked_loss import loss_per_token, loss_sum
from model.parallel.collectives import LOCAL
from model.parallel.mesh import Mesh, MeshSizes
from tests.distributed import run_ranks

ROWS, VOCAB, WIDTH = 700, 96, 24


def inputs(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator).to(dtype))
    return x, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three chunks, the last one smaller."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", {"cpu": 1})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_per_token_loss_equals_cross_entropy_of_logits(temperature):
    x, weight, labels = inputs()
    ours = loss_per_token(x, weight, labels, LOCAL, temperature)
    plain = F.cross_entropy(F.linear(x, weight) / temperature, labels, reduction="none")
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(plain, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sum_equals_cross_entropy_of_logits_whatever_it_is_scaled_by():
    x, weight, labels = inputs()
    ours, plain = loss_sum(x, weight, labels, LOCAL), F.cross_entropy(F.linear(x, weight), labels, reduction="sum")
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours / 3, (x, weight)), torch.autograd.grad(plain / 3, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_in_bf16_and_the_softmax_in_fp32():
    x, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_sum(x, weight, labels, LOCAL)
    logits = (x.bfloat16() @ weight.bfloat16().t()).float()
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-6, atol=0)
    exact = torch.autograd.grad(loss_sum(x, weight, labels, LOCAL), weight)[0]
    found = torch.autograd.grad(ours, weight)[0]
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.01


def test_under_autocast_the_heads_gradient_is_added_up_in_fp32():
    """Rounded to bf16 on its way to the weight, it would lose what many rows add."""
    x, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum(x, weight, labels, LOCAL).backward()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("per_token", [False, True])
def test_a_deferred_weight_gradient_is_the_same(per_token):
    (x, weight, labels), split = inputs(), BackwardSplit()

    def loss():
        if per_token:
            return loss_per_token(x, weight, labels, LOCAL, 1.0, split).sum()
        return loss_sum(x, weight, labels, LOCAL, split)

    loss().backward()
    expected, weight.grad = weight.grad, None
    with split.deferred() as queue:
        loss().backward()
    assert weight.grad is None
    queue.run()
    assert torch.equal(weight.grad, expected)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that anything returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits():
    x, weight, labels = inputs()
    with LargestTensor() as seen:
        loss_sum(x, weight, labels, LOCAL).backward()
        loss_per_token(x, weight, labels, LOCAL, 1.0).sum().backward()
    assert seen.numel == 256 * VOCAB < ROWS * VOCAB


def test_the_loss_of_given_logits_is_cross_entropy_and_leaves_them_as_they_are():
    x, weight, labels = inputs()
    logits = F.linear(x, weight)
    before = logits.detach().clone()
    ours = loss_of_logits(logits, labels, LOCAL)
    torch.testing.assert_close(ours, F.cross_entropy(before, labels, reduction="none"))
    assert torch.equal(logits, before) and not ours.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_of_a_probability_that_fp32_cannot_hold_has_its_loss_and_gradient(dtype):
    logits = torch.tensor([[0.0, 200.0, 3.0], [1.0, 2.0, 3.0], [-torch.inf, 0.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 1, 0])
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    torch.testing.assert_close(loss_of_logits(logits, labels, LOCAL).double(), expected, rtol=1e-6, atol=0)
    expected[:2].sum().backward()
    label_losses(logits, labels, LOCAL, gradient=True)
    close = 1e-6 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(logits[:2].double(), exact.grad[:2], rtol=close, atol=1e-30)


def vocabulary_in_two(rank: int) -> torch.Tensor:
    axis = Mesh(MeshSizes(tp=2)).axis("tp")
    x, weight, labels = inputs()
    return loss_of_logits(F.linear(x, weight).chunk(2, 1)[rank], labels, axis)


def test_the_loss_of_given_logits_is_the_same_with_the_vocabulary_cut():
    x, weight, labels = inputs()
    whole = loss_of_logits(F.linear(x, weight), labels, LOCAL)
    for part in run_ranks(vocabulary_in_two, 2):
        torch.testing.assert_close(part, whole)
