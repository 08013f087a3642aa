"""Which attention a layer has."""

from __future__ import annotations

from collections.abc import Callable

from model.attention.mla import MultiHeadLatentAttention
from model.config import ModelConfig

_KINDS: dict[str, Callable[[ModelConfig], MultiHeadLatentAttention]] = {"mla": MultiHeadLatentAttention}


def build_attention(config: ModelConfig) -> MultiHeadLatentAttention:
    """A module that maps (x [batch, seq / sp, hidden_size], rotation, mask) to the shape of x.

    rotation is complex [batch or 1, seq / sp, rotary_dim / 2]; mask is bool [batch, 1, seq, seq] or None for plain
    causal attention.
    """
    return _KINDS[config.attention](config)
