"""-log p(label) of logits that are there, a few rows at a time: those that stay in one core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.limits import BLOCK_ELEMENTS
from model.kernels.operations import softmax_loss
from model.parallel.collectives import Axis, all_reduce


def slices(rows: int, size: int) -> Iterator[slice]:
    """0 to `rows` in parts of `size`, the last one smaller."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _block_rows(logits: Tensor, axis: Axis) -> int:
    """All, where each part would take launches or exchanges of its own."""
    if logits.device.type != "cpu" or axis.size > 1:
        return max(1, len(logits))
    return max(1, BLOCK_ELEMENTS // logits.shape[1])


def in_blocks(
    logits: Tensor, axis: Axis, loss: Callable[[Tensor, slice], Tensor | None], *, overwrite: bool = True
) -> None:
    """Show all of the logits [rows, vocab_size / tp] to `loss`, a few rows at a time.

    It is called with them in fp32, to be overwritten, and with which rows they are; what it returns takes their place.

    Args:
        overwrite: False leaves the logits as they are where nothing takes their place.
    """
    for rows in slices(len(logits), _block_rows(logits, axis)):
        block = logits[rows]
        made = loss(block.to(torch.float32, copy=not overwrite), rows)
        if made is not None and made.data_ptr() != block.data_ptr():
            block.copy_(made)


def _mine(labels: Tensor, vocab_size: int, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Column of every label [rows, 1] in this rank's slice, and where it lies outside of it."""
    index = (labels - axis.index * vocab_size).unsqueeze(1)
    if axis.size == 1:
        return index, None
    outside = (index < 0) | (index >= vocab_size)
    return index.masked_fill(outside, 0), outside


def _together(logits: Tensor, column: Tensor, outside: Tensor | None, axis: Axis) -> tuple[Tensor, Tensor]:
    """-log p(label) [rows, 1], and probabilities in place of the logits, which are in fp32."""
    logits -= all_reduce(logits.amax(-1, keepdim=True), axis, dist.ReduceOp.MAX)
    chosen = logits.gather(1, column)
    if outside is not None:
        chosen = chosen.masked_fill(outside, 0.0)
    total = all_reduce(logits.exp_().sum(-1, keepdim=True), axis)
    logits /= total
    return total.log_() - all_reduce(chosen, axis), logits


def _put_label_gradient(logits: Tensor, column: Tensor, outside: Tensor | None, gradient: Tensor) -> None:
    """Where `logits` hold the gradients of -log p(label) by all other entries: that by the label's, [rows, 1]."""
    gradient = gradient.to(logits.dtype)
    if outside is not None:
        gradient = torch.where(outside, logits.gather(1, column), gradient)
    rows = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    logits.index_put_((rows, column), gradient)  # scatter_ would copy the logits


def label_losses(
    logits: Tensor,
    labels: Tensor,
    axis: Axis,
    *,
    gradient: bool,
    temperature: float = 1.0,
    scale: Tensor | None = None,
    overwrite: bool = True,
) -> Tensor:
    """-log p(label) at the temperature, fp32 [rows], from logits [rows, vocab_size / tp].

    Args:
        gradient: leave it in the place of the logits, times `scale` [rows, 1] if there is one. It is that by the logits
            at the temperature.
        overwrite: False leaves the logits as they are; else there are none afterwards.
    """
    column, outside = _mine(labels, logits.shape[1], axis)
    alone = axis.size == 1 and logits.device.type == "cpu"
    losses = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)

    def block(exact: Tensor, rows: slice) -> Tensor | None:
        if temperature != 1:
            exact /= temperature
        # Alone, nothing is outside; together, all rows are one block.
        losses[rows], made = softmax_loss(exact, column[rows]) if alone else _together(exact, column, outside, axis)
        if not gradient:
            return None
        return made if scale is None else made.mul_(scale[rows])

    in_blocks(logits, axis, block, overwrite=overwrite)
    if gradient:
        of_label = torch.expm1(-losses)  # its probability less one
        _put_label_gradient(logits, column, outside, of_label if scale is None else of_label.mul_(scale))
    return losses.squeeze(1)


@torch.no_grad()
def loss_of_logits(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """-log p(label) in nats, without gradients: fp32 [rows].

    Args:
        logits: [rows, vocab_size / tp]; left as they are. labels: [rows], all to be counted.
    """
    return label_losses(logits, labels, axis, gradient=False, overwrite=False)
