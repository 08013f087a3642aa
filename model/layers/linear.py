"""The model's matrix product, in one place so that it can be swapped, and so that its backward can be cut in two
(`model.kernels.weight_gradients`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu.products import by_onednn
from model.kernels.limits import LEAST
from model.kernels.operations import product, transposed_product
from model.kernels.weight_gradients import BackwardSplit, weight_gradient


class _SeparableLinear(torch.autograd.Function):
    """x @ weight.T by `product`, whose backward can be cut in two. `owner` holds the parameter that `weight` is (a copy
    of, under autocast)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, owner: tuple[Tensor], split: BackwardSplit | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.split = owner, split
        return _rows(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        need_input, need_weight, *_ = ctx.needs_input_grad
        grad = grads[0]
        dx = _rows(grad, weight) if need_input else None
        if not need_weight:
            return dx, None, None, None

        def gradient() -> Tensor:
            return transposed_product(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))

        return dx, weight_gradient(ctx.split, ctx.owner[0], gradient), None, None


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., k] x [k, n] -> [..., n]."""
    return product(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], matrix.shape[1])


def operand_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x is computed in: autocast's dtype, or that of x where there is none."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def as_operand(x: Tensor) -> Tensor:
    """x as matrix products read it: where several do, one cast serves them, and sums their gradients in its dtype."""
    return x.to(operand_dtype(x))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """What runs within computes in the dtypes that it is given. Where there is no autocast this costs nothing."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_better_by_product(x: Tensor, weight: Tensor) -> bool:
    """Small ones, as where tokens are generated one by one, are not even asked for their dtype."""
    return x.numel() * weight.shape[0] >= LEAST and operand_dtype(x) == torch.float32 and by_onednn(x)


def linear(x: Tensor, weight: Tensor, split: BackwardSplit | None = None) -> Tensor:
    """[..., in] x [out, in] -> [..., out]; `weight` is a parameter. Follows autocast as `F.linear` does."""
    separable = split is not None and torch.is_grad_enabled()
    if not separable and not _is_better_by_product(x, weight):
        return F.linear(x, weight)
    dtype = operand_dtype(x)
    return _SeparableLinear.apply(x.to(dtype), weight.to(dtype), (weight,), split)


class Linear(nn.Linear):
    """`nn.Linear` without bias, whose weight gradient can be computed apart.

    Attributes:
        product: the matrix product, (x, weight parameter, backward_split) -> output.
        backward_split: lets the weight gradient be computed later.
    """

    product: Callable[[Tensor, Tensor, BackwardSplit | None], Tensor] = staticmethod(linear)
    backward_split: BackwardSplit | None = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.product(x, self.weight, self.backward_split)
