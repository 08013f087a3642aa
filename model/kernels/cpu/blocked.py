"""Causal softmax attention by blocks of queries.

Most of what the mask hides is never computed (`model.kernels.cpu.blocks`). There are two forms:

- torch's fused kernel on one part after another, which keeps no probabilities (`model.kernels.cpu.fused_blocks`);
- products of whole parts, which keep them for the backward pass (`BlockedAttention`): quicker for wide heads, and in
  bf16 for all.

Measured on two cores against torch's kernel on whole rows of 256 to 2048 tokens, forward and backward: 0.5 to 0.8 of
its time in fp32, 0.25 to 0.4 in bf16, without documents; with four documents to a row 0.4 in fp32. A window of 64 with
a stride of 64 takes rows of 2048 in 0.15 to 0.23 of the time without, one of 64 with a stride of 16 rows of 1024 in
0.35 to 0.45. Keys and values may differ in width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.kernels.cpu.blocks import Part, add_rows, document_parts, hide, visible_parts
from model.kernels.cpu.fused_blocks import FusedBlocks
from model.kernels.limits import LONGEST, keeps_probabilities


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool
) -> Tensor:
    """As `model.kernels.plain.attention`, of whole rows."""
    assert q.shape[2] == k.shape[2]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return blocked_attention(q, k, v, mask, scale, window, documents)


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool
) -> Tensor:
    """softmax(q k^T * scale) v over the visible keys at or before each query, in the quicker of the two forms.

    Args:
        q, k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim]. mask: bool [batch or 1, 1, seq, seq] or None.
        window: the mask hides most of what is before the last `window` tokens.
        documents: the mask hides other documents, and nothing else: there is no window.
    """
    batch, _, seq, width = q.shape
    reach = seq if window is None else min(window, seq)
    keeps = keeps_probabilities(width, v.shape[-1], reach, bf16=q.dtype == torch.bfloat16, longest=LONGEST)
    if mask is None or documents:
        parts = document_parts(mask, batch, seq, alone=not keeps)
    else:
        parts = visible_parts(mask, batch, window)
    if keeps:
        return BlockedAttention.apply(q, k, v, mask, scale, parts)
    return FusedBlocks.apply(q, k, v, mask, scale, parts)


class BlockedAttention(torch.autograd.Function):
    """Products of whole parts; arguments as `blocked_attention`'s."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, parts: list[Part]
    ) -> Tensor:
        batch, heads, seq, _ = q.shape
        k, v = k.reshape(batch * heads, seq, -1), v.reshape(batch * heads, seq, -1)
        out = torch.empty(batch, seq, heads, v.shape[2], dtype=q.dtype)
        kept = []
        for part in parts:
            rows, queries, keys, _ = part
            each, mine = _each_head(rows, heads), q[rows, :, queries]
            mine = torch.mul(mine, scale, out=mine.new_empty(mine.shape)).flatten(0, 1)
            scores = torch.bmm(mine, _transposed(k[each, keys])).float()
            hide(scores.view(-1, heads, *scores.shape[1:]), mask, part)
            probabilities = torch.softmax(scores, -1).to(q.dtype)
            mixed = torch.bmm(probabilities, v[each, keys])
            out[rows, queries] = mixed.view(-1, heads, *mixed.shape[1:]).transpose(1, 2)
            kept += [mine, probabilities]
        ctx.save_for_backward(k, v, out, *kept)
        ctx.scale, ctx.parts = scale, parts
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, out, *kept = ctx.saved_tensors
        batch, seq, heads, _ = out.shape
        # Rows of d(scores) sum to zero: the part to subtract is <dout, out> (FlashAttention, arXiv:2205.14135, B.2).
        mean = (grads[0] * out.transpose(1, 2)).sum(-1, keepdim=True, dtype=torch.float32).to(k.dtype)
        dq, dk, dv = k.new_empty(batch, seq, heads, k.shape[2]).transpose(1, 2), None, None
        each_part = zip(ctx.parts, kept[::2], kept[1::2], strict=True)
        for (rows, queries, keys, _), q, probabilities in reversed(list(each_part)):  # the last one meets most keys
            each = _each_head(rows, heads)
            dout = grads[0][rows, :, queries].reshape(*q.shape[:2], -1)
            dscores = torch.bmm(dout, _transposed(v[each, keys]))
            dscores.sub_(mean[rows, :, queries].reshape(*q.shape[:2], 1)).mul_(probabilities)
            # A product and a sum: baddbmm_ into a part of a tensor would run one matrix at a time.
            dv = add_rows(dv, each, keys, torch.bmm(probabilities.transpose(1, 2), dout), v)
            mixed = torch.bmm(dscores, k[each, keys])
            torch.mul(mixed.view(-1, heads, *mixed.shape[1:]), ctx.scale, out=dq[rows, :, queries])
            dk = add_rows(dk, each, keys, torch.bmm(dscores.transpose(1, 2), q), k)
        assert dk is not None and dv is not None
        dk, dv = (t.view(batch, heads, seq, -1) for t in (dk, dv))
        return dq, dk, dv, None, None, None


def _transposed(matrices: Tensor) -> Tensor:
    """[batch, n, m] -> [batch, m, n]; of a part in bf16 `bmm` would make a copy itself, and turn it: twice as slow."""
    return (matrices.contiguous() if matrices.dtype == torch.bfloat16 else matrices).transpose(1, 2)


def _each_head(rows: slice, heads: int) -> slice:
    return slice(rows.start * heads, rows.stop * heads)
