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
import torch.distributed as dist
from torch import Tensor

from model.layers.linear import operand_dtype, weight_gradient_queue
from model.layers.product import by_onednn, product, transposed_product
from model.parallel.collectives import Axis, all_reduce

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}  # logits at a time: 8 MB stay in a CPU's cache, a GPU wants more work

COLUMNS = {"cpu": 4096}  # of a chunk's product with its states, made at a time: what is added stays small


def _chunks(x: Tensor, vocab_size: int) -> Iterator[slice]:
    size = max(256, CHUNK_ELEMENTS.get(x.device.type, 2**27) // vocab_size)
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def _mine(labels: Tensor, vocab_size: int, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Column of every label [rows, 1] in this rank's slice, and where it lies outside of it."""
    index = (labels - axis.index * vocab_size).unsqueeze(1)
    if axis.size == 1:
        return index, None
    outside = (index < 0) | (index >= vocab_size)
    return index.masked_fill(outside, 0), outside


def _exponentials(logits: Tensor, column: Tensor, outside: Tensor | None, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """In place: exp(logit - highest). Also the sum of it and -log p(label), both [rows, 1]."""
    highest = all_reduce(logits.amax(-1, keepdim=True), axis, dist.ReduceOp.MAX)
    logits -= highest
    chosen = logits.gather(1, column)
    if outside is not None:
        chosen = chosen.masked_fill(outside, 0.0)
    exponentials = logits.exp_()
    total = all_reduce(exponentials.sum(-1, keepdim=True), axis)
    return exponentials, total, total.log() - all_reduce(chosen, axis)


def _subtract_label(probabilities: Tensor, column: Tensor, outside: Tensor | None) -> Tensor:
    """In place: the gradient of -log p(label) by the logits."""
    one = torch.ones((), device=column.device).expand(column.shape)
    if outside is not None:
        one = one.masked_fill(outside, 0.0)
    return probabilities.scatter_add_(1, column, -one)


class _WeightGradient:
    """Sum over chunks of gradient^T x, in fp32."""

    def __init__(self, weight: Tensor, needed: bool):
        self.value = torch.zeros(weight.shape, device=weight.device) if needed else None

    def add(self, gradient: Tensor, x: Tensor) -> None:
        if self.value is None:
            return
        if gradient.dtype == torch.float32 and not by_onednn(x):
            self.value.addmm_(gradient.t(), x)
            return
        columns = COLUMNS.get(x.device.type, gradient.shape[1])
        for part, into in zip(gradient.split(columns, 1), self.value.split(columns), strict=True):
            into += transposed_product(part, x)


def _hand_over(weight_gradient: Tensor | None, owner: Tensor) -> Tensor | None:
    """To autograd, or to the queue of a backward that leaves weight gradients for later."""
    queue = weight_gradient_queue()
    if queue is None or weight_gradient is None:
        return weight_gradient
    queue.add(owner, lambda: weight_gradient)
    return None


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
            made, gradient = loss(product(part, weight.t()).float(), rows, need_input or need_weight)
            sums += made
            if gradient is not None:
                gradient = gradient.to(x.dtype)
                if dx is not None:
                    product(gradient, weight, dx[rows])
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


class _LabelLoss:
    """-log p(label), summed.

    Args:
        labels: [rows], all to be counted. axis: over which the vocabulary is cut.
    """

    count = 1

    def __init__(self, labels: Tensor, axis: Axis):
        self.labels, self.axis = labels, axis

    def __call__(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        column, outside = _mine(self.labels[rows], logits.shape[1], self.axis)
        exponentials, total, loss = _exponentials(logits, column, outside, self.axis)
        gradient = _subtract_label(exponentials.div_(total), column, outside) if with_gradient else None
        return loss.sum(0), gradient


class _PerToken(torch.autograd.Function):
    """One value per row; backward computes the logits again, because only then is each row's weight known."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, axis: Axis, owner: tuple[Tensor], temperature: float
    ) -> Tensor:
        out = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, weight.shape[0]):
            column, outside = _mine(labels[rows], weight.shape[0], axis)
            logits = product(x[rows], weight.t()).float().div_(temperature)
            out[rows] = _exponentials(logits, column, outside, axis)[2].squeeze(1)
        ctx.save_for_backward(x, weight, labels)
        ctx.axis, ctx.owner, ctx.temperature = axis, owner, temperature
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        need_input, need_weight, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_input else None
        dweight = _WeightGradient(weight, need_weight)
        scale = grads[0].unsqueeze(1) / ctx.temperature
        for rows in _chunks(x, weight.shape[0]):
            column, outside = _mine(labels[rows], weight.shape[0], ctx.axis)
            logits = product(x[rows], weight.t()).float().div_(ctx.temperature)
            exponentials, total, _ = _exponentials(logits, column, outside, ctx.axis)
            gradient = _subtract_label(exponentials.div_(total), column, outside).mul_(scale[rows]).to(x.dtype)
            if dx is not None:
                product(gradient, weight, dx[rows])
            dweight.add(gradient, x[rows])
        return dx, _hand_over(dweight.value, ctx.owner[0]), None, None, None, None


def chunked_sums(x: Tensor, weight: Tensor, loss: ChunkLoss) -> Tensor:
    """The loss's sums [count], fp32; gradients flow through the first alone.

    Args:
        x: [rows, hidden_size]. weight: a parameter [vocab_size / tp, hidden_size].
    """
    dtype = operand_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _Sums.apply(x.to(dtype), weight.to(dtype), loss, (weight,))


def loss_sum(x: Tensor, weight: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Sum of -log p(label) in nats, fp32.

    Args:
        x: [rows, hidden_size]. weight: a parameter [vocab_size / tp, hidden_size]. labels: [rows], all to be counted.
    """
    return chunked_sums(x, weight, _LabelLoss(labels, axis))[0]


def loss_per_token(x: Tensor, weight: Tensor, labels: Tensor, axis: Axis, temperature: float) -> Tensor:
    """-log p(label) at the given temperature, fp32 [rows]; arguments as in `loss_sum`."""
    dtype = operand_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _PerToken.apply(x.to(dtype), weight.to(dtype), labels, axis, (weight,), temperature)


@torch.no_grad()
def loss_of_logits(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """-log p(label) in nats where the logits exist already, without gradients: fp32 [rows].

    Args:
        logits: [rows, vocab_size / tp]; left as they are. labels: [rows], all to be counted.
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _chunks(logits, logits.shape[1]):
        column, outside = _mine(labels[rows], logits.shape[1], axis)
        out[rows] = _exponentials(logits[rows].to(torch.float32, copy=True), column, outside, axis)[2].squeeze(1)
    return out
