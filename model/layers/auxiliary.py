"""Losses of single layers (balance of experts, the indexer of sparse attention) beside the model's main one.

Such a loss never travels to the end of the model: `Counting.add_loss` ties it to an activation of its layer, whose
backward starts it. So it works on every pipeline stage and is the same in every layout: it is a *sum* over the tokens
of this rank and micro-batch, padding left out, and the engine says what one token's share of the mean over the global
batch is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.parallel.collectives import Arrivals

LOSSES = ("aux_loss", "indexer_kl")  # balance of experts; the indexer of sparse attention


class LayerLosses:
    """Losses of single layers during a training step: what they are scaled with, and their sums for its report.

    Args:
        scale: gradient of every such loss (a sum over tokens): the engine's loss scale / tokens of the global batch.
    """

    def __init__(self, scale: float):
        self.scale = scale
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def add(self, name: str, total: Tensor, tokens: Tensor | int) -> None:
        """Take note of one layer's loss on one micro-batch; `total` is a scalar, the sum over `tokens` tokens."""
        before = self._sums.get(name)
        self._sums[name] = (total, tokens) if before is None else (before[0] + total, before[1] + tokens)

    def pair(self, name: str) -> tuple[float, int]:
        """Sum and number of tokens (one token counts once per layer); zeros where no layer here has such a loss."""
        total, tokens = self._sums.get(name, (0.0, 0))
        return float(total), int(tokens)


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.scale), None


@dataclass(frozen=True)
class Counting:
    """What layers count of a pass beside computing their output: loads of experts, and losses of their own.

    Attributes:
        real: bool [batch, seq / sp], False for padding, which no load and no such loss counts; None: all are tokens.
        losses: of the training step; None where none are wanted (inference, evaluation).
        repeated: a checkpointed layer runs again in the backward pass: everything was counted the first time.
        arrivals: of a checkpointed layer, what experts' tokens were on their way; None where nothing is repeated.
    """

    real: Tensor | None = None
    losses: LayerLosses | None = None
    repeated: bool = False
    arrivals: Arrivals | None = None

    @property
    def wants_losses(self) -> bool:
        """Whether a layer is to compute its loss at all."""
        return self.losses is not None and torch.is_grad_enabled()

    def add_loss(self, x: Tensor, loss: Tensor, name: str, *, weight: float = 1.0) -> Tensor:
        """Tie a wanted loss to an activation of the same layer that the main loss depends on: x -> x.

        Args:
            x: [..., width]; its leading dimensions are positions.
            loss: scalar, a sum over the positions that count, before `weight`.
            name: one of `LOSSES`, under which it is reported, unweighted, as a mean per token and layer.
            weight: what its gradient is multiplied by.
        """
        assert name in LOSSES, name
        assert self.losses is not None
        if not self.repeated:
            self.losses.add(name, loss.detach(), x.shape[:-1].numel() if self.real is None else self.real.sum())
        return _AddLoss.apply(x, loss, self.losses.scale * weight)


EVERY_TOKEN = Counting()  # and no loss of a layer
