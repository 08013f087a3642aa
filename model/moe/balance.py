"""Losses that keep experts evenly used: within every sequence, or over the whole batch. Pure functions of scores.

Both are sum_i f_i * P_i, where P_i, the mean score of expert i, has a gradient and f_i, the share of choices that fell
on it (times the number of experts), has none. They are returned as sums over tokens, as `model.layers.auxiliary` wants
them: given f, the loss is linear in the scores, so every rank adds up its own tokens and no rank counts another's.
Padding is no token: it is neither in a sum nor in f.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.parallel.collectives import LOCAL, Axis, all_reduce


def affinities(scores: Tensor) -> Tensor:
    """Scores of a token as shares of their sum (DeepSeek-V3, arXiv:2412.19437, eq. 19): [tokens, experts] -> same."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def sequence_loss(scores: Tensor, chosen: Tensor, rows: int, sp: Axis = LOCAL, counted: Tensor | None = None) -> Tensor:
    """Sequence-wise balance (DeepSeek-V3, eqs. 17-20), a packed row being a sequence.

    Args:
        scores: [rows * seq / sp, experts], not negative. chosen: [rows * seq / sp, k] experts of each token.
        sp: ranks that hold the other positions of the same rows.
        counted: bool [rows * seq / sp], False for padding; None: all are tokens.
    Returns:
        Scalar: every row's loss times its tokens that are here; summed over ranks and divided by all tokens, the mean
        of the rows' losses. One for experts used evenly.
    """
    experts = scores.shape[1]
    present = (torch.ones_like(chosen[:, 0]) if counted is None else counted).to(scores.dtype).unsqueeze(1)
    shares = (affinities(scores) * present).unflatten(0, (rows, -1))  # [rows, seq / sp, experts]
    counts = shares.new_zeros(rows, experts)
    counts.scatter_add_(1, chosen.view(rows, -1), present.expand_as(chosen).reshape(rows, -1))
    counts = all_reduce(counts, sp)
    fractions = counts * (experts / counts.sum(1, keepdim=True).clamp(min=1))  # a row's counts are k times its tokens
    return (fractions * shares.sum(1)).sum()


def batch_loss(scores: Tensor, fraction: Tensor, counted: Tensor | None = None) -> Tensor:
    """Balance over the batch (Switch Transformer, arXiv:2101.03961, eqs. 4-6).

    The paper takes f_i of the same batch. Here it is that of the optimizer step before, over all ranks: it is known
    before the first token is routed, and does not depend on how a batch is cut into ranks and micro-batches. With a
    large weight the answer comes a step late and overshoots: keep to the paper's 0.01 (in 40 steps of 128 tokens at
    3e-3, a weight of 0.1 still evened the load out, and at 1.0 the busiest expert got 3.6 times the mean).

    Args:
        scores: [tokens, experts], not negative. fraction: [experts], adding up to one; zeros before the first step,
            which has no gradient then, as an even one would have none.
        counted: bool [tokens], False for padding; None: all are tokens.
    Returns:
        Scalar, the sum over tokens.
    """
    each = affinities(scores) @ fraction
    return (each if counted is None else each * counted).sum() * fraction.numel()
