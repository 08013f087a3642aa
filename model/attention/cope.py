"""Contextual position encoding (CoPE, arXiv:2405.18719): tokens are counted where the query says that they count.

A query i opens a gate to every key j, g_ij = sigmoid(q_i k_j) (eq. 3), and the position of a key is the number of open
gates from it up to the query, p_ij = g_ij + ... + g_ii (eq. 4). It is no integer, so its embedding lies between those
of its neighbours (eq. 5), and q_i e[p_ij] joins the score.

As in the paper's code, gates are of the scaled scores, the product with the embedding is not scaled, one table serves
all heads of a layer, and it starts at zero: attention without positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.attention.core import attention_of_scores, grouped_scores


class _PositionLogits(torch.autograd.Function):
    """Keeps its inputs alone and computes the rest again: autograd would keep nine times as much per pair of tokens."""

    @staticmethod
    def _between(scores: Tensor, per_position: Tensor) -> tuple[Tensor, ...]:
        """Gates, their sums, and the whole positions below and above, all [..., n]."""
        gates = torch.sigmoid(scores)
        # Summed from the query backwards: near keys, whose positions matter most, get the most exact ones.
        position = gates.flip(-1).cumsum(-1).flip(-1)
        within = position.clamp(max=per_position.shape[-1] - 1)
        return gates, position, within, within.floor(), within.ceil()

    @staticmethod
    def forward(ctx: Any, scores: Tensor, per_position: Tensor) -> Tensor:
        ctx.save_for_backward(scores, per_position)
        _, _, within, below, above = _PositionLogits._between(scores, per_position)
        table = per_position.float()
        return torch.lerp(table.gather(-1, below.long()), table.gather(-1, above.long()), within - below)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        scores, per_position = ctx.saved_tensors
        gates, position, within, below, above = _PositionLogits._between(scores, per_position)
        share, below, above = within - below, below.long(), above.long()
        table = per_position.float()
        wrt_table = torch.zeros_like(table).scatter_add_(-1, below, grads[0] * (1 - share))
        wrt_table.scatter_add_(-1, above, grads[0] * share)
        wrt_position = grads[0] * (table.gather(-1, above) - table.gather(-1, below))
        wrt_position = wrt_position.masked_fill_(position > per_position.shape[-1] - 1, 0.0)
        # A gate counts for its own key and for all before it.
        wrt_scores = wrt_position.cumsum(-1) * gates * (1 - gates)
        return wrt_scores, wrt_table.to(per_position.dtype)


def position_logits(scores: Tensor, per_position: Tensor) -> Tensor:
    """q_i e[p_ij], in fp32.

    Args:
        scores: scaled, fp32 [..., n], -inf where the query does not look.
        per_position: q_i e[p] at whole positions, [..., cope_positions]; positions beyond the last are taken for it.
    Returns:
        [..., n].
    """
    out: Tensor = _PositionLogits.apply(scores, per_position)
    return out


def contextual_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, scale: float, mask: Tensor | None
) -> Tensor:
    """softmax(q (k + e[p])) v, causal where no mask is given.

    Args:
        q: [batch, heads, seq, dim]; k: [batch, kv_heads, seq, dim]; v: [batch, kv_heads, seq, v_dim].
        table: e, [cope_positions, dim].
        mask: bool [batch or 1, 1, seq, seq], True = visible.
    Returns:
        [batch, heads, seq, v_dim].
    """
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    q = q.contiguous()  # read twice: both products then keep the same copy
    scores = (grouped_scores(q, k).float() * scale).masked_fill(~mask, -torch.inf)
    return attention_of_scores(scores + position_logits(scores, q @ table.t()), v)
