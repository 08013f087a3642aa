"""Sums of a loss that needs whole distributions over the vocabulary, without ever holding [tokens, vocab_size].

Like `chunked_loss`, which knows the one loss of a label: logits of a few rows at a time, gradients in the same pass.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from model.layers.chunked_loss import _chunks, _hand_over, _WeightGradient
from model.layers.linear import operand_dtype


class ChunkLoss(Protocol):
    """A loss of a few rows' logits.

    Attributes:
        count: how many sums it makes.
    """

    count: int

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            logits: [chunk, vocab_size / tp] fp32, this rank's slice; may be overwritten. rows: which ones they are.
        Returns:
            Sums over these rows and the whole vocabulary [count], and the gradient of the first of them by `logits`.
        """
        ...


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: ChunkLoss, owner: tuple[Tensor]) -> Tensor:
        need_input, need_weight, *_ = ctx.needs_input_grad
        sums = torch.zeros(loss.count, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_input else None
        dweight = _WeightGradient(weight, need_weight)
        for rows in _chunks(x, weight.shape[0]):
            part = x[rows]
            made, gradient = loss((part @ weight.t()).float(), rows, need_input or need_weight)
            sums += made
            if gradient is not None:
                gradient = gradient.to(x.dtype)
                if dx is not None:
                    torch.mm(gradient, weight, out=dx[rows])
                dweight.add(gradient, part)
            del gradient  # before the next chunk's distributions are there
        ctx.gradients, ctx.owner = [dx, dweight.value], owner
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.gradients  # scaled in place: a second backward through the same graph is not allowed
        ctx.gradients = None
        if dx is not None:
            dx.mul_(grads[0][0])
        if dweight is not None:
            dweight = _hand_over(dweight.mul_(grads[0][0]), ctx.owner[0])
        return dx, dweight, None, None


def chunked_sums(x: Tensor, weight: Tensor, loss: ChunkLoss) -> Tensor:
    """The loss's sums [count], fp32; gradients flow through the first alone.

    Args:
        x: [rows, hidden_size]. weight: a parameter [vocab_size / tp, hidden_size].
    """
    dtype = operand_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Sums.apply(x.to(dtype), weight.to(dtype), loss, (weight,))
