"""The one place where softmax attention is computed, and the masks of packed documents."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import operations


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


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    window: int | None = None,
    documents: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v, causal where no mask is given.

    Args:
        q: [batch, heads, seq, qk_dim]; k: [batch, kv_heads, seq, qk_dim]; v: [batch, kv_heads, seq, v_dim].
        mask: bool [batch or 1, 1, seq, seq], True = visible.
        window: the mask hides most of what is before each query's last `window` tokens; saves work on the CPU.
        documents: the mask is a `document_mask`; saves work on the CPU.
    Returns:
        [batch, heads, seq, v_dim].
    """
    return operations.attention(q, k, v, mask, scale, window, documents)


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T without copies of k: [batch, heads, n, dim], [batch, kv_heads, m, dim] -> [batch, heads, n, m]."""
    n = q.shape[2]
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # queries of a group one after another
    return (q @ k.transpose(-1, -2)).unflatten(2, (-1, n)).flatten(1, 2)


def attention_of_scores(scores: Tensor, v: Tensor) -> Tensor:
    """softmax(scores) v, where a kind had to see the scores: fp32 [batch, heads, n, m], v [batch, kv_heads, m, v_dim].

    Returns:
        [batch, heads, n, v_dim], in the dtype of v.
    """
    n = scores.shape[2]
    weights = torch.softmax(scores, -1).to(v.dtype).reshape(v.shape[0], v.shape[1], -1, v.shape[2])
    return (weights @ v).unflatten(2, (-1, n)).flatten(1, 2)
