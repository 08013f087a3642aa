"""What decoding remembers of the tokens it has seen: one latent and one rotary key per token and layer.

This is all MLA needs (DeepSeek-V2, arXiv:2405.04434, §2.1.2): keys and values of every head are linear in the latent.
Knows no weights; rows are right-aligned, so that every row writes to the same column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig


class LatentCache:
    """Preallocated [num_layers][rows, capacity, kv_lora_rank + qk_rope_head_dim].

    Attributes:
        layers: one tensor per layer; columns before `length` are filled.
        length: filled columns, the same in every row; shorter rows begin with padding.
        padding: [rows] int64, columns at the start of each row that hold nothing.
        bias: [rows, 1, capacity], added to attention scores: -inf over padding, else 0.
    """

    def __init__(self, layers: list[Tensor], padding: Tensor, length: int):
        self.layers = layers
        self.padding = padding
        self.length = length
        columns = torch.arange(layers[0].shape[1], device=padding.device)
        visible = torch.zeros((), dtype=layers[0].dtype, device=padding.device)
        self.bias = torch.where(columns < padding[:, None], -torch.inf, visible).unsqueeze(1)

    @classmethod
    def allocate(cls, config: ModelConfig, padding: Tensor, capacity: int, dtype: torch.dtype) -> LatentCache:
        """An empty cache for `len(padding)` rows of up to `capacity` columns, padding included."""
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (len(padding), capacity, width)
        layers = [torch.empty(shape, dtype=dtype, device=padding.device) for _ in range(config.num_hidden_layers)]
        return cls(layers, padding, 0)

    @property
    def positions(self) -> Tensor:
        """Position of the next token of each row: [rows]."""
        return self.length - self.padding

    def select(self, rows: Tensor, capacity: int) -> LatentCache:
        """A new cache of `rows` (indices, repeats allowed) with room for `capacity` more columns.

        Columns that are padding in every chosen row are dropped.
        """
        padding = self.padding[rows]
        first = int(padding.min())
        layers = []
        for old in self.layers:
            kept = self.length - first
            new = old.new_empty(len(rows), kept + capacity, old.shape[2])
            torch.index_select(old[:, first : self.length], 0, rows, out=new[:, :kept])
            layers.append(new)
        return LatentCache(layers, padding - first, self.length - first)
