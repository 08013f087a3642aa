"""What decoding remembers of the tokens it has seen: some features per token and layer, whatever attention reads.

MLA keeps a latent and a rotary key (DeepSeek-V2, arXiv:2405.04434, §2.1.2: keys and values of every head are linear in
the latent), other kinds their keys and values. Knows no weights; rows are right-aligned, so that every row writes to
the same column.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated [recursion_depth * num_layers][rows, capacity, width of the layer].

    Attributes:
        layers: one tensor per layer, once more for each further pass through the stack; columns before `length` are
            filled.
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
    def allocate(cls, widths: list[int], padding: Tensor, capacity: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for `len(padding)` rows of up to `capacity` columns, padding included.

        Args:
            widths: features of a token in each layer's cache.
        """
        rows = len(padding)
        layers = [torch.empty(rows, capacity, width, dtype=dtype, device=padding.device) for width in widths]
        return cls(layers, padding, 0)

    @property
    def positions(self) -> Tensor:
        """Position of the next token of each row: [rows]."""
        return self.length - self.padding

    def select(self, rows: Tensor, capacity: int) -> KVCache:
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
        return KVCache(layers, padding - first, self.length - first)

    def joined(self, rows: Tensor, other: KVCache, capacity: int) -> KVCache:
        """A new cache of `rows` (indices) and behind them every row of `other`, with room for `capacity` more columns.

        Every row stays right-aligned; the filled columns are those of the longest one.
        """
        own, theirs = self.length - self.padding[rows], other.length - other.padding
        length = int(torch.cat([own, theirs]).max())
        layers = []
        for old, new in zip(self.layers, other.layers, strict=True):
            # Zeros, since what stands in padding is multiplied by an attention weight of 0 and must be finite.
            whole = old.new_zeros(len(rows) + len(theirs), length + capacity, old.shape[2])
            mine, added = min(length, self.length), min(length, other.length)
            whole[: len(rows), length - mine : length] = old[rows, self.length - mine : self.length]
            whole[len(rows) :, length - added : length] = new[:, other.length - added : other.length]
            layers.append(whole)
        return KVCache(layers, length - torch.cat([own, theirs]), length)
