"""Causal softmax attention by blocks of queries, for the CPU.

Most of what the mask hides is never computed (`model.attention.blocks`). There are two forms:

- torch's fused kernel on one part after another, which keeps no probabilities (`FusedBlocks`);
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
import torch.nn.functional as F
from torch import Tensor

from model.attention.blocks import Keys, Part, bias_of, document_parts, hide, visible_parts

# Features of a head in fp32 from which products of blocks are quicker than the fused kernel by so much that it is worth
# keeping their probabilities: from 48 on by a twentieth of a training step (measured).
WIDE = 64
LONGEST = 2048  # tokens in reach: probabilities take [seq, seq / 2] a head


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool = False
) -> Tensor:
    """softmax(q k^T * scale) v over the visible keys at or before each query, in the quicker of the two forms.

    Args:
        q, k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim]. mask: bool [batch or 1, 1, seq, seq] or None.
        window: the mask hides most of what is before the last `window` tokens.
        documents: the mask hides other documents, and nothing else: there is no window.
    """
    batch, _, seq, width = q.shape
    reach = seq if window is None else min(window, seq)
    form = BlockedAttention if keeps_probabilities(q.dtype, width, v.shape[-1], reach) else FusedBlocks
    if mask is None or documents:
        parts = document_parts(mask, batch, seq, alone=form is FusedBlocks)
    else:
        parts = visible_parts(mask, batch, window)
    return form.apply(q, k, v, mask, scale, parts)


def _add_rows(total: Tensor | None, rows: slice, keys: Keys, values: Tensor, like: Tensor) -> Tensor:
    """Add to some keys of some rows of `total` [rows, ..., seq, dim], which is None before the first values.

    Args:
        like: of the shape that `total` has.
    """
    if total is None:
        if isinstance(keys, slice) and values.shape == like.shape:
            return values
        total = torch.zeros_like(like)
    if isinstance(keys, slice):
        total[rows][..., keys, :].add_(values)
    else:
        total[rows].index_add_(-2, keys, values)
    return total


def keeps_probabilities(dtype: torch.dtype, width: int, v_dim: int, reach: int) -> bool:
    """Whether products of blocks are the quicker form, or the only one, for heads of these widths."""
    return v_dim > width or (reach <= LONGEST and (dtype == torch.bfloat16 or width >= WIDE))


class FusedBlocks(torch.autograd.Function):
    """torch's fused CPU kernel, forward and backward, for each part; arguments as `blocked_attention`'s."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, parts: list[Part]
    ) -> Tensor:
        batch, heads, seq, width = q.shape
        v_dim = v.shape[-1]
        v = F.pad(v, (0, width - v_dim)) if v_dim < width else v  # the kernel wants equal widths
        out = q.new_empty(batch, seq, heads, width).transpose(1, 2)
        kept = []
        for part in parts:
            rows, queries, keys, _ = part
            out[rows, :, queries], log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], scale=scale, **_hidden(mask, part, q.dtype)
            )
            kept.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.mask, ctx.scale, ctx.parts, ctx.v_dim = mask, scale, parts, v_dim
        return out[..., :v_dim]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        dout = F.pad(grads[0], (0, q.shape[-1] - ctx.v_dim))
        dq, dk, dv = torch.empty_like(q), None, None
        for part, log_sum in zip(reversed(ctx.parts), reversed(kept), strict=True):  # the last one meets most keys
            rows, queries, keys, _ = part
            hidden = {"is_causal": False} | _hidden(ctx.mask, part, q.dtype)
            dq[rows, :, queries], dk_part, dv_part = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    dout[rows, :, queries], q[rows, :, queries], k[rows, :, keys], v[rows, :, keys],
                    out[rows, :, queries], log_sum, dropout_p=0.0, scale=ctx.scale, **hidden,
                )
            )  # fmt: skip
            dk = _add_rows(dk, rows, keys, dk_part, k)
            dv = _add_rows(dv, rows, keys, dv_part, v)
        assert dv is not None
        return dq, dk, dv[..., : ctx.v_dim], None, None, None


def _hidden(mask: Tensor | None, part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """How the fused kernel is told what a part does not see."""
    if part.causal and isinstance(part.keys, slice) and part.keys.start == part.queries.start:
        return {"is_causal": True}
    return {"attn_mask": bias_of(mask, part).to(dtype)}


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
            dv = _add_rows(dv, each, keys, torch.bmm(probabilities.transpose(1, 2), dout), v)
            mixed = torch.bmm(dscores, k[each, keys])
            torch.mul(mixed.view(-1, heads, *mixed.shape[1:]), ctx.scale, out=dq[rows, :, queries])
            dk = _add_rows(dk, each, keys, torch.bmm(dscores.transpose(1, 2), q), k)
        assert dk is not None and dv is not None
        dk, dv = (t.view(batch, heads, seq, -1) for t in (dk, dv))
        return dq, dk, dv, None, None, None


def _transposed(matrices: Tensor) -> Tensor:
    """[batch, n, m] -> [batch, m, n]; of a part in bf16 `bmm` would make a copy itself, and turn it: twice as slow."""
    return (matrices.contiguous() if matrices.dtype == torch.bfloat16 else matrices).transpose(1, 2)


def _each_head(rows: slice, heads: int) -> slice:
    return slice(rows.start * heads, rows.stop * heads)
