"""Log-probabilities and cross-entropy from hidden states and the head.

Sums, never averages: the caller knows the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # torch's cross_entropy ignores this label


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats over labels other than IGNORE.

    Args:
        hidden: [batch, seq, hidden_size]; head: [vocab_size, hidden_size]; labels: [batch, seq].
    """
    kept = labels != IGNORE
    logits = F.linear(hidden[kept], head).float()
    return F.cross_entropy(logits, labels[kept], reduction="sum")


def label_logprobs(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(label) at the given temperature: [batch, seq], zero where the label is IGNORE."""
    kept = labels != IGNORE
    logits = F.linear(hidden[kept], head).float() / temperature
    chosen = -F.cross_entropy(logits, labels[kept], reduction="none")
    return torch.zeros(labels.shape, dtype=chosen.dtype, device=labels.device).masked_scatter(kept, chosen)


def shifted_labels(labels: Tensor, doc_ids: Tensor, depth: int) -> Tensor:
    """Labels `depth` places further on, IGNORE where that place is past the row or in another document."""
    out = torch.full_like(labels, IGNORE)
    same = doc_ids[:, depth:] == doc_ids[:, :-depth]
    out[:, :-depth] = torch.where(same, labels[:, depth:], IGNORE)
    return out
