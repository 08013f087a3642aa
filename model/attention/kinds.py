"""Which attention a layer has, and which tokens it sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention.core import document_mask
from model.attention.grouped import GroupedAttention
from model.attention.mla import MultiHeadLatentAttention
from model.attention.sliding import sliding_mask
from model.attention.sparse import SparseAttention
from model.config import ModelConfig
from model.kernels.limits import keeps_probabilities

_KINDS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "mla": MultiHeadLatentAttention,
    "dsa": SparseAttention,
    "mha": GroupedAttention,
    "gqa": GroupedAttention,
    "mqa": GroupedAttention,
    "sliding": GroupedAttention,
}


def build_attention(config: ModelConfig) -> nn.Module:
    """A module that maps (x [batch, seq / sp, hidden_size], rotation, mask, counting, values) to the shape of x.

    rotation is complex [batch or 1, seq / sp, rotary_dim / 2]; mask is `visible_tokens`; counting
    says which queries a loss of the layer's own is over; values are added to its own (`model.layers.values`).
    """
    return _KINDS[config.attention](config)


def visible_tokens(config: ModelConfig, doc_ids: Tensor | None, seq_len: int, device: torch.device) -> Tensor | None:
    """What each query may see: bool [batch or 1, 1, seq, seq], or None for every token up to itself.

    Args:
        doc_ids: [batch, seq]; None for rows of one document.
    """
    if config.attention == "sliding":
        if doc_ids is None:
            doc_ids = torch.zeros(1, seq_len, dtype=torch.long, device=device)
        return sliding_mask(doc_ids, config.sliding_window, config.global_stride)
    return None if doc_ids is None else document_mask(doc_ids)


def meets_documents_alone(config: ModelConfig, seq_len: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention in packed rows computes every document by itself, and not all that is before it in the row."""
    plain = config.position == "rope" and config.attention not in ("sliding", "dsa") and device.type == "cpu"
    return plain and not keeps_probabilities(
        config.qk_head_dim, config.value_head_dim, seq_len, bf16=dtype == torch.bfloat16
    )
