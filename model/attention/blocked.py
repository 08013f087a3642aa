"""Causal softmax attention by blocks of queries, for the CPU.

A block of queries meets only the keys up to its own end, so that what the mask would hide above the diagonal is never
computed; with a sliding window only those in reach, and before them those that someone in the block sees. Measured on
two cores against torch's fused kernel, for sequences from 256 to 2048: 0.4 to 0.8 of its time in fp32 with heads from
32 to 192 wide, 0.25 to 0.4 in bf16 with heads from 16 to 192; narrower heads in fp32 are no quicker and keep the fused
kernel. Keys and values may differ in width. A window of 64 with a stride of 64 takes rows of 2048 in 0.15 to 0.23 of
the time without, one of 64 with a stride of 16 rows of 1024 in 0.35 to 0.45.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
WORTH_CHOOSING = 128  # keys before the window: of fewer it is quicker to meet all (measured)
NARROW = 32  # heads below are no quicker by blocks in fp32 (measured), and the fused kernel keeps no probabilities
LONGEST = 2048  # probabilities are kept for backward, [seq, seq / 2] a head; behind this the fused kernel is used


def quicker_by_blocks(q: Tensor, window: int | None) -> bool:
    """Whether queries [batch, heads, seq, qk_dim] are to attend here rather than in the fused kernel."""
    met = q.shape[2] if window is None else min(window, q.shape[2])
    return met <= LONGEST and (q.shape[-1] >= NARROW or q.dtype == torch.bfloat16 or window is not None)


def columns_of(mask: Tensor | None, start: int, stop: int, window: int | None) -> slice | Tensor:
    """Keys that queries `start` to `stop` meet: all before their end, or with a window those that any of them sees."""
    reach = 0 if window is None else max(0, start - window + 1)
    if reach < WORTH_CHOOSING or mask is None:
        return slice(0, stop)
    far = mask[:, :, start:stop, :reach].flatten(0, 2).any(0).nonzero().squeeze(1)
    return torch.cat([far, torch.arange(reach, stop)])


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v over the visible keys at or before each query.

    q, k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim]; mask: bool [batch, 1, seq, seq] or None. With a
    window most of what is before the last `window` tokens is hidden by the mask.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        batch, heads, seq, _ = q.shape
        q = (q * scale).reshape(batch * heads, seq, -1)
        k, v = k.reshape(batch * heads, seq, -1), v.reshape(batch * heads, seq, -1)
        out = torch.empty(batch, seq, heads, v.shape[2], dtype=q.dtype)
        kept, columns = [], []
        for start in range(0, seq, BLOCK):
            stop = min(start + BLOCK, seq)
            met = columns_of(mask, start, stop, window)
            scores = torch.bmm(q[:, start:stop], k[:, met].transpose(1, 2)).float()
            if mask is None:
                ahead = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
                scores[:, :, start:].masked_fill_(ahead, -torch.inf)
            else:
                by_head = scores.view(batch, heads, stop - start, -1)
                by_head.masked_fill_(mask[:, :, start:stop, met].logical_not(), -torch.inf)
            probabilities = torch.softmax(scores, -1).to(q.dtype)
            part = torch.bmm(probabilities, v[:, met]).view(batch, heads, stop - start, -1)
            out[:, start:stop] = part.transpose(1, 2)
            kept.append(probabilities)
            columns.append(met)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale, ctx.columns = scale, columns
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        batch, seq, heads, _ = out.shape
        dout = grads[0].reshape(batch * heads, seq, -1)
        # Rows of d(scores) sum to zero: the part to subtract is <dout, out> (FlashAttention, arXiv:2205.14135, B.2).
        mean = (grads[0] * out.transpose(1, 2)).sum(-1, keepdim=True, dtype=torch.float32).to(q.dtype)
        mean = mean.reshape(batch * heads, seq, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, probabilities in enumerate(kept):
            start = block * BLOCK
            stop = min(start + BLOCK, seq)
            mine = dout[:, start:stop]
            met = ctx.columns[block]
            _add_product(dv, met, probabilities, mine)
            dscores = torch.bmm(mine, v[:, met].transpose(1, 2)).sub_(mean[:, start:stop])
            dscores.mul_(probabilities)
            dq[:, start:stop] = torch.bmm(dscores, k[:, met])
            _add_product(dk, met, dscores, q[:, start:stop])
        dq, dk, dv = (t.view(batch, heads, seq, -1) for t in (dq.mul_(ctx.scale), dk, dv))
        return dq, dk, dv, None, None, None


def _add_product(into: Tensor, rows: slice | Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to some rows of `into` [batch * heads, seq, dim]."""
    product = torch.bmm(left.transpose(1, 2), right)
    if isinstance(rows, slice):
        into[:, rows] += product  # baddbmm_ into a part of a tensor would run one matrix at a time
    else:
        into.index_add_(1, rows, product)
