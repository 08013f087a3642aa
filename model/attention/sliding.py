"""Which tokens sliding-window attention sees: a window of the last ones, and before it every so many-th.

The window is Longformer's (arXiv:2004.05150, §3.1), turned causal; the tokens at multiples of a stride that every later
query of the document sees are the summaries of the strided pattern in sparse transformers (arXiv:1904.10509, §4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.core import document_mask, document_positions


def sliding_mask(doc_ids: Tensor, window: int, stride: int) -> Tensor:
    """Of what `document_mask` shows, the last `window` tokens and the document's positions 0, stride, 2 stride, ...

    Args:
        doc_ids: [batch, seq].
        window: tokens seen, the query's own included.
    Returns:
        bool [batch, 1, seq, seq], True = visible.
    """
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    near = index[:, None] - index < window
    every = document_positions(doc_ids) % stride == 0
    return document_mask(doc_ids) & (near | every[:, None, None, :])
