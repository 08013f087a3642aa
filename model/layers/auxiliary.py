"""Losses of single layers (balance of experts, the indexer of sparse attention) beside the model's main one.

Such a loss never travels to the end of the model: `add_loss` ties it to an activation of its layer, whose backward
starts it. So it works on every pipeline stage and is the same in every layout: it is a *sum* over the tokens of this
rank and micro-batch, padding left out, and the engine says what one token's share of the mean over the global batch is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LOSSES = ("aux_loss", "indexer_kl")  # balance of experts; the indexer of sparse attention


class AuxiliarySums:
    """Losses of a training step by name, for its report: sums over layers and this rank's tokens, and how many."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def add(self, name: str, total: Tensor, tokens: Tensor | int) -> None:
        """Take note of one layer's loss on one micro-batch; `total` is a scalar, the sum over `tokens` tokens."""
        before = self._sums.get(name)
        self._sums[name] = (total, tokens) if before is None else (before[0] + total, before[1] + tokens)

    def pair(self, name: str) -> tuple[float, int]:
        """Sum and number of tokens (one token counts once per layer); zeros where no layer here has such a loss."""
        total, tokens = self._sums.get(name, (0.0, 0))
        return float(total), int(tokens)


class _Step:
    """Of the whole process, not of a thread: autograd recomputes a GPU's checkpointed layers in threads of its own."""

    scale: float | None = None
    sums: AuxiliarySums | None = None


@contextmanager
def auxiliary_scale(scale: float) -> Iterator[AuxiliarySums]:
    """Forwards within compute the losses of single layers; yields what they add up to.

    Args:
        scale: gradient of every such loss (a sum over tokens): the engine's loss scale / tokens of the global batch.
    """
    before = _Step.scale, _Step.sums
    _Step.scale, _Step.sums = scale, AuxiliarySums()
    try:
        yield _Step.sums
    finally:
        _Step.scale, _Step.sums = before


@contextmanager
def not_recording() -> Iterator[None]:
    """Losses within were taken note of before: a checkpointed layer runs again."""
    before, _Step.sums = _Step.sums, None
    try:
        yield
    finally:
        _Step.sums = before


def current_scale() -> float | None:
    """The gradient of a loss of the step that runs; None where none is wanted (inference, evaluation)."""
    return _Step.scale if torch.is_grad_enabled() else None


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.scale), None


def add_loss(x: Tensor, loss: Tensor, name: str, *, weight: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """Tie a loss to an activation of the same layer that the main loss depends on: x -> x.

    Check `current_scale() is not None` before computing the loss at all.

    Args:
        x: [..., width]; its leading dimensions are positions.
        loss: scalar, a sum over the positions that count, before `weight`.
        name: one of `LOSSES`, under which it is reported, unweighted, as a mean per token and layer.
        weight: what its gradient is multiplied by.
        counted: bool, of x's leading dimensions, False for padding; None: all are tokens.
    """
    scale = current_scale()
    assert name in LOSSES, name
    if scale is None:
        return x
    if _Step.sums is not None:
        _Step.sums.add(name, loss.detach(), x.shape[:-1].numel() if counted is None else counted.sum())
    return _AddLoss.apply(x, loss, scale * weight)
