"""Cross-entropy on the CPU: torch's softmax is several times quicker than the same thing step by step."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30  # a probability whose logarithm fp32 still knows


def softmax_loss(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """As `model.kernels.plain.softmax_loss`."""
    probabilities = torch.softmax(logits, -1)
    label = probabilities.gather(1, column)
    if bool((label < SMALLEST).any()):
        return torch.logsumexp(logits, -1, keepdim=True) - logits.gather(1, column), probabilities
    return label.log_().neg_(), probabilities
