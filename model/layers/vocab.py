"""Embedding and head, each rank holding its slice of the vocabulary under tensor parallelism."""

from __future__ import annotations

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

    With labels: -log p(label) instead, without the logits. All go through the module's call, in which ZeRO 3 gathers
    the weight.
    """

    tp: Axis = LOCAL

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        per_token: bool = False,
        chunk_loss: ChunkLoss | None = None,
    ) -> Tensor:
        """
        Args:
            labels: [rows] for x [rows, hidden_size]. chunk_loss: of the logits of such an x.
        Returns:
            Logits, the sum of -log p(label), or `per_token` [rows] of them at the temperature, or `chunk_loss`'s sums.
        """
        x = copy_to(x, self.tp)
        if chunk_loss is not None:
            return chunked_sums(x, self.weight, chunk_loss)
        if labels is None:
            return super().forward(x)
        if per_token:
            return loss_per_token(x, self.weight, labels, self.tp, temperature)
        return loss_sum(x, self.weight, labels, self.tp)
