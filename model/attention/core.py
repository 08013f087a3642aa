"""The one place where softmax attention is computed, and the masks of packed documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_positions(doc_ids: Tensor) -> Tensor:
    """Position of each token inside its own document: [batch, seq] -> [batch, seq]."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def document_mask(doc_ids: Tensor) -> Tensor:
    """True where a query may look: earlier or same position, same document. [batch, seq] -> [batch, 1, seq, seq]."""
    seq = doc_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=doc_ids.device).tril()
    return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & causal).unsqueeze(1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(q k^T * scale) v, causal where no mask is given.

    Args:
        q, k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim].
        mask: bool [batch, 1, seq, seq], True = visible.
    Returns:
        [batch, heads, seq, v_dim].
    """
    width = v.shape[-1]
    if width < q.shape[-1]:
        # Fused kernels want equal widths; with unequal ones torch falls back to the slow math path.
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]
