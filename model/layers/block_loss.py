"""-log p(label) of logits that are there, a few rows at a time: those that stay in one core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from model.parallel.collectives import Axis, all_reduce

BLOCK_ELEMENTS = 2**18  # logits that a CPU works on at a time: 1 MB in fp32


def slices(rows: int, size: int) -> Iterator[slice]:
    """0 to `rows` in parts of `size`, the last one smaller."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _block_rows(logits: Tensor, axis: Axis) -> int:
    """All, where each part would take launches or exchanges of its own."""
    if logits.device.type != "cpu" or axis.size > 1:
        return max(1, len(logits))
    return max(1, BLOCK_ELEMENTS // logits.shape[1])


def in_blocks(logits: Tensor, axis: Axis, loss: Callable[[Tensor, slice], Tensor | None]) -> None:
    """Show all of the logits [rows, vocab_size / tp] to `loss`, a few rows at a time.

    It is called with them in fp32, to be overwritten, and with which rows they are; what it returns takes their place.
    """
    for rows in slices(len(logits), _block_rows(logits, axis)):
        block = logits[rows]
        made = loss(block.float(), rows)
        if made is not None and made.data_ptr() != block.data_ptr():
            block.copy_(made)


def _mine(labels: Tensor, vocab_size: int, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Column of every label [rows, 1] in this rank's slice, and where it lies outside of it."""
    index = (labels - axis.index * vocab_size).unsqueeze(1)
    if axis.size == 1:
        return index, None
    outside = (index < 0) | (index >= vocab_size)
    return index.masked_fill(outside, 0), outside


def _softmax(logits: Tensor, column: Tensor, outside: Tensor | None, axis: Axis) -> Tensor:
    """In place: probabilities. Returns -log p(label) [rows, 1]."""
    highest = all_reduce(logits.amax(-1, keepdim=True), axis, dist.ReduceOp.MAX)
    if axis.size == 1 and logits.device.type == "cpu":
        chosen = logits.gather(1, column)
        torch.softmax(logits, -1, out=logits)  # twice as quick as step by step
        # The likeliest entry's probability is 1 over the normaliser.
        return highest - chosen - logits.amax(-1, keepdim=True).log_()
    logits -= highest
    chosen = logits.gather(1, column)
    if outside is not None:
        chosen = chosen.masked_fill(outside, 0.0)
    total = all_reduce(logits.exp_().sum(-1, keepdim=True), axis)
    logits /= total
    return total.log_() - all_reduce(chosen, axis)


def _subtract_label(probabilities: Tensor, column: Tensor, outside: Tensor | None) -> None:
    """In place: the gradient of -log p(label) by the logits."""
    one = torch.ones((), device=column.device).expand(column.shape)
    if outside is not None:
        one = one.masked_fill(outside, 0.0)
    probabilities.scatter_add_(1, column, -one)


def label_losses(
    logits: Tensor, labels: Tensor, axis: Axis, *, gradient: bool, temperature: float = 1.0, scale: Tensor | None = None
) -> Tensor:
    """-log p(label) at the temperature, fp32 [rows], from logits [rows, vocab_size / tp], which are overwritten.

    Args:
        gradient: leave it in the place of the logits, times `scale` [rows, 1] if there is one. It is that by the logits
            at the temperature.
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)

    def block(exact: Tensor, rows: slice) -> Tensor | None:
        column, outside = _mine(labels[rows], logits.shape[1], axis)
        if temperature != 1:
            exact /= temperature
        out[rows] = _softmax(exact, column, outside, axis).squeeze(1)
        if not gradient:
            return None
        _subtract_label(exact, column, outside)
        return exact if scale is None else exact.mul_(scale[rows])

    in_blocks(logits, axis, block)
    return out


@torch.no_grad()
def loss_of_logits(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """-log p(label) in nats, without gradients: fp32 [rows].

    Args:
        logits: [rows, vocab_size / tp]; left as they are. labels: [rows], all to be counted.
    """
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in slices(len(logits), _block_rows(logits, axis)):
        column, outside = _mine(labels[rows], logits.shape[1], axis)
        out[rows] = _softmax(logits[rows].to(torch.float32, copy=True), column, outside, axis).squeeze(1)
    return out
