"""Every form that a device has of an operation equals the plain formula, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.core import document_mask
from model.attention.sliding import sliding_mask
from model.kernels import plain
from model.kernels.operations import OVERRIDES, chosen
from model.kernels.rows import plan_rows

# Of the largest number there is, for fp32 and for what is multiplied in bf16.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
Case = tuple[Sequence[Tensor], Sequence[Any]]  # what has a gradient, and the arguments after it


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def _products(generator: torch.Generator, dtype: torch.dtype, transposed: bool) -> list[Case]:
    out: list[Case] = []
    for m, k, n in ((1, 5, 3), (70, 160, 200), (0, 4, 6)):
        a, b = _random(generator, dtype, *((k, m) if transposed else (m, k))), _random(generator, dtype, k, n)
        out += [((), (a, b)), ((), (a, b, torch.empty(m, n, dtype=dtype)))]
    return out


def _attention(generator: torch.Generator, dtype: torch.dtype) -> list[Case]:
    out: list[Case] = []
    for seq, keys, width, value in ((70, 4, 12, 8), (200, 4, 64, 64), (200, 2, 16, 16), (33, 1, 8, 8)):
        q = _random(generator, dtype, 2, 4, seq, width)
        k, v = (_random(generator, dtype, 2, keys, seq, dim) for dim in (width, value))
        documents = torch.stack([torch.arange(seq) // 40, torch.arange(seq) // 7])
        for mask, window, alone in (
            (None, None, True),
            (document_mask(documents), None, True),
            (sliding_mask(documents, 9, 4), 9, False),
        ):
            out.append(((q, k, v), (mask, 0.3, window, alone)))
    return out


def _experts(generator: torch.Generator, dtype: torch.dtype) -> list[Case]:
    out: list[Case] = []
    for tokens, k, multiple in ((6, 2, 1), (40, 2, 16), (1, 1, 1)):
        x, weights = _random(generator, dtype, tokens, 16), torch.rand(tokens, k, generator=generator)
        matrices = (_random(generator, torch.float32, 4, *shape) / 4 for shape in ((16, 16), (16, 8)))
        scores = torch.rand(tokens, 4, generator=generator)
        scores[:, 2] = -1.0  # nobody's choice
        out.append(((x, *matrices, weights), (plan_rows(scores.topk(k).indices, 4, multiple),)))
    return out


def _losses(generator: torch.Generator, dtype: torch.dtype) -> list[Case]:
    column = torch.tensor([[1], [0], [2]])
    sizes = (1.0, 300.0)  # and probabilities that fp32 does not hold
    return [((), (_random(generator, torch.float32, 3, 5) * size, column)) for size in sizes]


CASES: dict[str, Callable[[torch.Generator, torch.dtype], list[Case]]] = {
    "product": lambda generator, dtype: _products(generator, dtype, False),
    "transposed_product": lambda generator, dtype: _products(generator, dtype, True),
    "attention": _attention,
    "experts": _experts,
    "softmax_loss": _losses,
}


def _results(form: Callable[..., Any], leaves: Sequence[Tensor], rest: Sequence[Any]) -> list[Tensor]:
    """Values, then the gradients of a sum of them with random weights."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    made = form(*leaves, *(part.clone() if isinstance(part, Tensor) else part for part in rest))
    values = list(made) if isinstance(made, tuple) else [made]
    if not leaves:
        return values
    grad = torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1)).to(values[0].dtype)
    return [values[0].detach(), *torch.autograd.grad(values[0], leaves, grad)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("operation", "device"), OVERRIDES, ids="-".join)
def test_an_override_equals_the_formula(operation: str, device: str, dtype: torch.dtype) -> None:
    """On the CPU, where a GPU's forms run as well."""
    for leaves, rest in CASES[operation](torch.Generator().manual_seed(0), dtype):
        exact = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in rest]
        expected = _results(getattr(plain, operation), [leaf.float() for leaf in leaves], exact)
        found = _results(OVERRIDES[operation, device], leaves, rest)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            largest = float(b.abs().max()) if b.numel() else 0.0
            assert not b.numel() or float((a.float() - b).abs().max()) <= TOLERANCE[dtype] * max(largest, 1.0)


def test_a_device_without_a_form_of_its_own_gets_the_formula() -> None:
    assert chosen("attention", torch.device("meta")) is plain.attention
    assert chosen("attention", torch.device("cpu")) is OVERRIDES["attention", "cpu"]
    assert {operation for operation, _ in OVERRIDES} <= set(CASES) and all(hasattr(plain, name) for name in CASES)
