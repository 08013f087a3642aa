"""Log-probabilities and cross-entropy from hidden states and the head.

Sums, never averages: the caller knows the weight. Under tensor parallelism a rank sees its slice of the vocabulary
alone: maxima, normalisers and the label's entry are exchanged, logits never are (arXiv:1909.08053, §3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.layers.vocab import Head
from model.parallel.collectives import Axis, all_reduce, reduce_from

IGNORE = -100  # torch's cross_entropy ignores this label


class _LogSoftmax(torch.autograd.Function):
    """log softmax over a vocabulary that is cut over an axis: [rows, vocab / n] -> same."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, axis: Axis) -> Tensor:
        highest = all_reduce(logits.amax(-1, keepdim=True), axis, dist.ReduceOp.MAX)
        total = all_reduce((logits - highest).exp().sum(-1, keepdim=True), axis)
        out = logits - (highest + total.log())
        ctx.save_for_backward(out)
        ctx.axis = axis
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return grads[0] - out.exp() * all_reduce(grads[0].sum(-1, keepdim=True), ctx.axis), None


def log_softmax(logits: Tensor, axis: Axis) -> Tensor:
    """log p of this rank's slice of the vocabulary: [rows, vocab_size / tp] -> same."""
    return F.log_softmax(logits, -1) if axis.size == 1 else _LogSoftmax.apply(logits, axis)


def negative_log_likelihood(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """-log p(label) in nats, [rows]. logits: [rows, vocab_size / tp] in fp32; labels: [rows], none of them IGNORE."""
    if axis.size == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    logprobs = log_softmax(logits, axis)
    index = labels - axis.index * logits.shape[-1]
    outside = (index < 0) | (index >= logits.shape[-1])
    found = logprobs.gather(1, index.masked_fill(outside, 0).unsqueeze(1)).squeeze(1)
    return -reduce_from(found.masked_fill(outside, 0.0), axis)


def cross_entropy_sum(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats over labels other than IGNORE.

    Args:
        hidden: [batch, seq, hidden_size]; labels: [batch, seq].
    """
    kept = labels != IGNORE
    return head(hidden[kept], labels[kept])


def label_logprobs(hidden: Tensor, head: Head, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(label) at the given temperature: [batch, seq], zero where the label is IGNORE."""
    kept = labels != IGNORE
    chosen = -head(hidden[kept], labels[kept], temperature=temperature, per_token=True)
    return torch.zeros(labels.shape, dtype=chosen.dtype, device=labels.device).masked_scatter(kept, chosen)


def shifted_labels(labels: Tensor, doc_ids: Tensor, depth: int) -> Tensor:
    """Labels `depth` places further on, IGNORE where that place is past the row or in another document."""
    out = torch.full_like(labels, IGNORE)
    same = doc_ids[:, depth:] == doc_ids[:, :-depth]
    out[:, :-depth] = torch.where(same, labels[:, depth:], IGNORE)
    return out
