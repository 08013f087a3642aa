"""Log-probabilities and cross-entropy from hidden states and the head.

Sums, never averages: the caller knows the weight. Under tensor parallelism a rank sees its slice of the vocabulary
alone: maxima, normalisers and the label's entry are exchanged, logits never are (arXiv:1909.08053, §3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.layers.vocab import Head

IGNORE = -100  # torch's cross_entropy ignores this label


def cross_entropy_sum(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats over labels other than IGNORE.

    Args:
        hidden: [batch, seq, hidden_size]; labels: [batch, seq].
    """
    kept = labels != IGNORE
    return head.loss_sum(hidden[kept], labels[kept])


def label_logprobs(hidden: Tensor, head: Head, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(label) at the given temperature: [batch, seq], zero where the label is IGNORE."""
    kept = labels != IGNORE
    chosen = -head.loss_per_token(hidden[kept], labels[kept], temperature)
    return torch.zeros(labels.shape, dtype=chosen.dtype, device=labels.device).masked_scatter(kept, chosen)


def tokens_ahead(doc_ids: Tensor, real: Tensor | None, depth: int) -> Tensor:
    """Where the token `depth` places further on is of the same document: bool [batch, seq].

    Args:
        doc_ids: [batch, seq]. real: bool [batch, seq], False for padding; None: all are tokens.
    """
    out = torch.ones_like(doc_ids, dtype=torch.bool) if real is None else real.clone()
    if depth:
        out[:, :-depth] &= doc_ids[:, depth:] == doc_ids[:, :-depth]
        out[:, -depth:] = False
    return out


def shifted_labels(labels: Tensor, doc_ids: Tensor, depth: int) -> Tensor:
    """Labels `depth` places further on, IGNORE where that place is past the row or in another document."""
    out = torch.full_like(labels, IGNORE)
    same = doc_ids[:, depth:] == doc_ids[:, :-depth]
    out[:, :-depth] = torch.where(same, labels[:, depth:], IGNORE)
    return out
