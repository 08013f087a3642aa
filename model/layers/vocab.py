"""Embedding and head, each rank holding its slice of the vocabulary under tensor parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """[..., hidden_size] -> logits [..., vocab_size / tp]: this rank's slice, never gathered."""

    tp: Axis = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copy_to(x, self.tp))
