"""Embedding and head, each rank holding its slice of the vocabulary under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.chunked_loss import ChunkLoss, chunked_sums, loss_per_token, loss_sum
from model.layers.linear import Linear
from model.parallel.collectives import LOCAL, Axis, copy_to, reduce_from


class Embedding(nn.Module):
    """Token ids [..., seq] -> [..., seq, hidden_size]; a rank adds zeros for tokens outside its slice."""

    tp: Axis = LOCAL

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        index = tokens - self.tp.index * rows
        outside = (index < 0) | (index >= rows)
        found = F.embedding(index.masked_fill(outside, 0), self.weight)
        return reduce_from(found.masked_fill(outside.unsqueeze(-1), 0.0), self.tp)


class Head(Linear):
    """[..., hidden_size] -> logits [..., vocab_size / tp]: this rank's slice, never gathered.

    Its losses never hold all logits. They go through the module's call too, in which ZeRO 3 gathers the weight.
    """

    tp: Axis = LOCAL

    def forward(self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits, or what `loss` makes of x and the weight."""
        x = copy_to(x, self.tp)
        return super().forward(x) if loss is None else loss(x, self.weight)

    def loss_sum(self, x: Tensor, labels: Tensor) -> Tensor:
        """Sum of -log p(label) in nats, a scalar: x [rows, hidden_size], labels [rows]."""
        return self(x, partial(loss_sum, labels=labels, axis=self.tp, split=self.backward_split))

    def loss_per_token(self, x: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """-log p(label) at the temperature, [rows]: x [rows, hidden_size], labels [rows]."""
        split = self.backward_split
        return self(x, partial(loss_per_token, labels=labels, axis=self.tp, temperature=temperature, split=split))

    def chunked_sums(self, x: Tensor, loss: ChunkLoss) -> Tensor:
        """The sums [loss.count] of a loss of x [rows, hidden_size]."""
        return self(x, partial(chunked_sums, loss=loss, split=self.backward_split))
