"""-log p(label) from hidden states and the head's weight, without ever holding [tokens, vocab_size].

Logits of a few rows at a time are computed, used and dropped while they are still in the cache. A sum's gradients are
made in the same pass (as in Liger Kernel, arXiv:2410.10989, §3.2); a loss per token computes its logits again in
backward. Under tensor parallelism a rank sees its slice of the vocabulary alone: maxima, normalisers and the label's
entry are exchanged, logits never are (arXiv:1909.08053, §3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.cpu.products import by_onednn
from model.kernels.limits import COLUMNS, chunk_rows
from model.kernels.operations import product, transposed_product
from model.kernels.weight_gradients import BackwardSplit, weight_gradient
from model.layers.block_loss import label_losses, slices
from model.layers.linear import as_operand, without_autocast
from model.parallel.collectives import Axis


def _chunks(x: Tensor, vocab_size: int) -> Iterator[slice]:
    """Rows whose logits are made at once, in the dtype of x."""
    return slices(len(x), chunk_rows(x.device.type, vocab_size, x.element_size()))


class _WeightGradient:
    """Sum over chunks of gradient^T x, in fp32."""

    def __init__(self, weight: Tensor, needed: bool):
        self.weight, self.needed = weight, needed
        self._sum: Tensor | None = None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        if not self.needed:
            return
        first = self._sum is None
        if self._sum is None:
            self._sum = torch.empty(self.weight.shape, device=x.device)
        if gradient.dtype == torch.float32 and not by_onednn(x):
            self._sum.addmm_(gradient.t(), x, beta=0 if first else 1)
            return
        columns = COLUMNS.get(x.device.type, gradient.shape[1])
        for part, into in zip(gradient.split(columns, 1), self._sum.split(columns), strict=True):
            # Not by a name, by which a part would stay while the next one is made.
            (into.copy_ if first else into.add_)(transposed_product(part, x))

    @property
    def value(self) -> Tensor | None:
        """None where none is needed."""
        if not self.needed:
            return None
        return torch.zeros(self.weight.shape, device=self.weight.device) if self._sum is None else self._sum


def _hand_over(made: Tensor | None, owner: Tensor, split: BackwardSplit | None) -> Tensor | None:
    """A weight gradient that is there already, to autograd or to where backwards put theirs."""
    return None if made is None else weight_gradient(split, owner, lambda: made)


class ChunkLoss(Protocol):
    """A loss of a few rows' logits.

    Attributes:
        count: how many sums it makes.
    """

    count: int

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            logits: [chunk, vocab_size / tp], this rank's slice, as the product made it; may be overwritten.
            rows: which ones they are.
        Returns:
            Sums over these rows and the whole vocabulary [count], and the gradient of the first of them by `logits`.
        """
        ...


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, loss: ChunkLoss, split: BackwardSplit | None) -> Tensor:
        need_input, need_weight, *_ = ctx.needs_input_grad
        matrix = weight.to(x.dtype)
        sums = torch.zeros(loss.count, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_input else None
        dweight = _WeightGradient(weight, need_weight)
        for rows in _chunks(x, weight.shape[0]):
            part = x[rows]
            made, gradient = loss(product(part, matrix.t()), rows, need_input or need_weight)
            sums += made
            if gradient is not None:
                gradient = gradient.to(x.dtype)
                if dx is not None:
                    product(gradient, matrix, dx[rows])
                dweight.add(gradient, part)
            del gradient  # before the next chunk's distributions are there
        ctx.gradients, ctx.owner, ctx.split = [dx, dweight.value], weight, split
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.gradients  # scaled in place: a second backward through the same graph is not allowed
        ctx.gradients = None
        if dx is not None:
            dx.mul_(grads[0][0])
        if dweight is not None:
            dweight = _hand_over(dweight.mul_(grads[0][0]), ctx.owner, ctx.split)
        return dx, dweight, None, None


class _LabelLoss:
    """-log p(label), summed.

    Args:
        labels: [rows], all to be counted. axis: over which the vocabulary is cut.
    """

    count = 1

    def __init__(self, labels: Tensor, axis: Axis):
        self.labels, self.axis = labels, axis

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        losses = label_losses(logits, self.labels[rows], self.axis, gradient=with_gradient)
        return losses.sum(0, keepdim=True), logits if with_gradient else None


class _PerToken(torch.autograd.Function):
    """One value per row; backward computes the logits again, because only then is each row's weight known."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        axis: Axis,
        temperature: float,
        split: BackwardSplit | None,
    ) -> Tensor:
        matrix = weight.to(x.dtype)
        out = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, weight.shape[0]):
            logits = product(x[rows], matrix.t())
            out[rows] = label_losses(logits, labels[rows], axis, gradient=False, temperature=temperature)
            del logits  # before the next ones are there
        ctx.save_for_backward(x, matrix, labels)
        ctx.axis, ctx.owner, ctx.temperature, ctx.split = axis, weight, temperature, split
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, labels = ctx.saved_tensors
        need_input, need_weight, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_input else None
        dweight = _WeightGradient(matrix, need_weight)
        scale = grads[0].unsqueeze(1) / ctx.temperature
        for rows in _chunks(x, matrix.shape[0]):
            logits = product(x[rows], matrix.t())
            label_losses(logits, labels[rows], ctx.axis, gradient=True, temperature=ctx.temperature, scale=scale[rows])
            if dx is not None:
                product(logits, matrix, dx[rows])
            dweight.add(logits, x[rows])
            del logits
        return dx, _hand_over(dweight.value, ctx.owner, ctx.split), None, None, None, None


def chunked_sums(x: Tensor, weight: Tensor, loss: ChunkLoss, split: BackwardSplit | None = None) -> Tensor:
    """The loss's sums [count], fp32; gradients flow through the first alone.

    Args:
        x: [rows, hidden_size]. weight: a parameter [vocab_size / tp, hidden_size].
        split: lets the weight gradient be handed over later.
    """
    x = as_operand(x)
    with without_autocast(x):
        return _Sums.apply(x, weight, loss, split)


def loss_sum(x: Tensor, weight: Tensor, labels: Tensor, axis: Axis, split: BackwardSplit | None = None) -> Tensor:
    """Sum of -log p(label) in nats, fp32.

    Args:
        x: [rows, hidden_size]. weight: a parameter [vocab_size / tp, hidden_size]. labels: [rows], all to be counted.
        split: as `chunked_sums` takes it.
    """
    return chunked_sums(x, weight, _LabelLoss(labels, axis), split)[0]


def loss_per_token(
    x: Tensor, weight: Tensor, labels: Tensor, axis: Axis, temperature: float, split: BackwardSplit | None = None
) -> Tensor:
    """-log p(label) at the given temperature, fp32 [rows]; arguments as in `loss_sum`."""
    x = as_operand(x)
    with without_autocast(x):
        return _PerToken.apply(x, weight, labels, axis, temperature, split)
