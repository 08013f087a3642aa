"""Attention for one new token a row: the interface that every kind decodes through, and which kind gets which."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from model.attention.grouped import GroupedAttention
from model.attention.mla import MultiHeadLatentAttention
from model.attention.sparse import SparseAttention
from model.generate.absorbed import AbsorbedAttention
from model.generate.grouped_step import ContextualStep, GroupedStep, SlidingStep
from model.generate.sparse_step import SparseStep


class DecodeAttention(Protocol):
    """One layer's attention over its cache.

    Attributes:
        width: features that a token takes in this layer's cache.
    """

    width: int

    def remember(self, y: Tensor, rotation: Tensor, into: Tensor, values: Tensor | None = None) -> None:
        """Write a prefix that the module itself attends.

        Args:
            y: [rows, n, hidden_size], normalised. rotation: complex [rows or 1, n, rotary_dim / 2].
            into: the first n columns of this layer's cache, [rows, n, width].
            values: [rows, n, kv_heads, v_dim], added to the layer's own (`model.layers.values`).
        """

    def step(
        self, x: Tensor, residual: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to the columns up to `column`, which is written first.

        Args:
            x: [rows, hidden_size], normalised; residual: same, added to the result.
            rotation: complex [rows, 1, rotary_dim / 2], of the new token's position in each row.
            cache: this layer's [rows, capacity, width].
            bias: [rows, 1, column + 1], added to attention scores: -inf over the padding that a row begins with, and
                zero behind it. A row's text is in consecutive columns; the first one is position 0.
            values: [rows, kv_heads, v_dim], added to the new token's.
        Returns:
            [rows, hidden_size].
        """


def build_decode_attention(
    attention: nn.Module, adds_values: bool = False, *, in_place: bool = False
) -> DecodeAttention:
    """The decode object of a built attention module, with weights laid out for it, or `in_place`, without a copy.

    `adds_values`: the layer has a value embedding, for which a latent kind's cache needs room.
    """
    if isinstance(attention, GroupedAttention):
        config = attention.config
        if config.position == "cope":
            return ContextualStep(attention, in_place=in_place)
        kind = SlidingStep if config.attention == "sliding" else GroupedStep
        return kind(attention, in_place=in_place)
    if isinstance(attention, SparseAttention):
        return SparseStep(attention, adds_values, in_place=in_place)
    assert isinstance(attention, MultiHeadLatentAttention)
    return AbsorbedAttention(attention, adds_values, in_place=in_place)
