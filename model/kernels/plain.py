"""The operations that have fast forms, as formulas. What runs where no device has a form of its own, and what the
overrides are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.rows import Plan
from model.kernels.weight_gradients import BackwardSplit


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b: [m, k] x [k, n] -> [m, n], into `out` if there is one."""
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def transposed_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a^T b: [k, m], [k, n] -> [m, n]."""
    return product(a.t(), b, out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool
) -> Tensor:
    """softmax(q k^T * scale) v (arXiv:1706.03762, eq. 1), causal where no mask is given.

    Args:
        q: [batch, heads, seq, qk_dim]; k: [batch, kv_heads, seq, qk_dim]; v: [batch, kv_heads, seq, v_dim].
        mask: bool [batch or 1, 1, seq, seq], True = visible.
        window, documents: what is known of the mask (`model.attention.core`); fast forms save work by it.
    Returns:
        [batch, heads, seq, v_dim].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)).float() * scale
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).to(v.dtype) @ v


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, plan: Plan, split: BackwardSplit | None = None
) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate(x)) * up(x)) (arXiv:2412.19437, eq. 12): [tokens, hidden]
    -> same.

    Args:
        gate_up: [experts, 2 * inner, hidden], gate first. down: [experts, hidden, inner].
        weights: [tokens, k] of the experts that the plan sends them to.
        split: of no use here, where autograd computes all gradients at once.
    """
    out = []
    for rows, first, second in zip(x[plan.source].split(plan.counts.tolist()), gate_up, down, strict=True):
        gate, up = F.linear(rows, first.to(x.dtype)).chunk(2, -1)
        out.append(F.linear(F.silu(gate) * up, second.to(x.dtype)))
    return (torch.cat(out)[plan.place] * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def softmax_loss(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits) of one column a row.

    Args:
        logits: fp32 [rows, vocab_size]; may be overwritten. column: int64 [rows, 1].
    Returns:
        Losses [rows, 1] and probabilities [rows, vocab_size], which but for the column are the gradient.
    """
    logprobs = torch.log_softmax(logits, -1)
    return -logprobs.gather(1, column), logprobs.exp()
