"""Causal softmax attention by blocks of queries, for the CPU.

A block of queries meets the keys from the first that one of them sees up to its own end, so that most of what the mask
hides is never computed: what is above the diagonal, and in packed rows what belongs to earlier documents. With a
sliding window it meets those in reach, and before them those that someone in the block sees. There are two forms:

- torch's fused kernel on one block after another, which keeps no probabilities (`FusedBlocks`);
- products of whole blocks, which keep them for the backward pass (`BlockedAttention`): quicker for wide heads, and in
  bf16 for all.

Measured on two cores against torch's kernel on whole rows of 256 to 2048 tokens, forward and backward: 0.5 to 0.8 of
its time in fp32, 0.25 to 0.4 in bf16, without documents; with four documents to a row 0.4 in fp32. A window of 64 with
a stride of 64 takes rows of 2048 in 0.15 to 0.23 of the time without, one of 64 with a stride of 16 rows of 1024 in
0.35 to 0.45. Keys and values may differ in width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
WORTH_CHOOSING = 128  # keys before the window: of fewer it is quicker to meet all (measured)
WIDE = 48  # features of a head in fp32, from which products of blocks are quicker than the fused kernel (measured)
LONGEST = 2048  # tokens in reach: probabilities take [seq, seq / 2] a head

Keys = slice | Tensor


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
    """softmax(q k^T * scale) v over the visible keys at or before each query, in the quicker of the two forms.

    Args:
        q, k: [batch, heads, seq, qk_dim]; v: [batch, heads, seq, v_dim]. mask: bool [batch or 1, 1, seq, seq] or None.
        window: the mask hides most of what is before the last `window` tokens.
    """
    reach = q.shape[2] if window is None else min(window, q.shape[2])
    keeps = reach <= LONGEST and (q.dtype == torch.bfloat16 or q.shape[-1] >= WIDE)
    form = BlockedAttention if keeps or v.shape[-1] > q.shape[-1] else FusedBlocks
    return form.apply(q, k, v, mask, scale, window)


def key_blocks(mask: Tensor | None, seq: int, window: int | None) -> Iterator[tuple[slice, Keys]]:
    """Every block's queries and the keys they meet: from the first that one of them sees to their own end; with a
    window those before it one by one."""
    # Of bytes, batch first: a hundred times faster than `any` over all of it.
    seen = None if mask is None else mask.view(torch.uint8).amax(0)[0]
    for start in range(0, seq, BLOCK):
        stop = min(start + BLOCK, seq)
        reach = 0 if window is None else max(0, start - window + 1)
        if seen is None:
            keys: Keys = slice(0, stop)
        elif reach < WORTH_CHOOSING:
            keys = slice(int(seen[start:stop, :stop].amax(0).argmax()), stop)
        else:
            far = seen[start:stop, :reach].amax(0).nonzero().squeeze(1)
            keys = torch.cat([far, torch.arange(reach, stop)])
        yield slice(start, stop), keys


def _bias(mask: Tensor | None, queries: slice, keys: Keys) -> Tensor:
    """What hides a key when it is added to its score: fp32 [batch or 1, 1, queries, keys]."""
    if mask is None:
        causal = torch.ones(queries.stop - queries.start, queries.stop, dtype=torch.uint8).tril(queries.start)
        visible = causal[None, None]
    else:
        visible = mask[:, :, queries, keys].view(torch.uint8)
    return visible.float().sub_(1.0).mul_(torch.finfo(torch.float32).max)  # finite, as 0 * inf is no number


def _add_rows(into: Tensor, keys: Keys, values: Tensor) -> None:
    """Add to some rows of `into` [..., seq, dim]."""
    if isinstance(keys, slice):
        into[..., keys, :] += values
    else:
        into.index_add_(into.dim() - 2, keys, values)


class FusedBlocks(torch.autograd.Function):
    """torch's fused CPU kernel, forward and backward, for each block; arguments as `blocked_attention`'s."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        batch, heads, seq, width = q.shape
        v_dim = v.shape[-1]
        v = F.pad(v, (0, width - v_dim)) if v_dim < width else v  # the kernel wants equal widths
        out = q.new_empty(batch, seq, heads, width).transpose(1, 2)
        kept, blocks = [], list(key_blocks(mask, seq, window))
        for queries, keys in blocks:
            bias = _bias(mask, queries, keys).to(q.dtype)
            out[:, :, queries], log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=bias, scale=scale
            )
            kept.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.mask, ctx.scale, ctx.blocks, ctx.v_dim = mask, scale, blocks, v_dim
        return out[..., :v_dim]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        dout = F.pad(grads[0], (0, q.shape[-1] - ctx.v_dim))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), log_sum in zip(ctx.blocks, kept, strict=True):
            dq[:, :, queries], dk_part, dv_part = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    dout[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries], log_sum,
                    0.0, False, attn_mask=_bias(ctx.mask, queries, keys).to(q.dtype), scale=ctx.scale,
                )
            )  # fmt: skip
            _add_rows(dk, keys, dk_part)
            _add_rows(dv, keys, dv_part)
        return dq, dk, dv[..., : ctx.v_dim], None, None, None


class BlockedAttention(torch.autograd.Function):
    """Products of whole blocks; arguments as `blocked_attention`'s."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        batch, heads, seq, _ = q.shape
        q = (q * scale).reshape(batch * heads, seq, -1)
        k, v = k.reshape(batch * heads, seq, -1), v.reshape(batch * heads, seq, -1)
        out = torch.empty(batch, seq, heads, v.shape[2], dtype=q.dtype)
        kept, blocks = [], list(key_blocks(mask, seq, window))
        for queries, keys in blocks:
            scores = torch.bmm(q[:, queries], k[:, keys].transpose(1, 2)).float()
            by_head = scores.view(batch, heads, queries.stop - queries.start, -1)
            by_head += _bias(mask, queries, keys)
            probabilities = torch.softmax(scores, -1).to(q.dtype)
            out[:, queries] = torch.bmm(probabilities, v[:, keys]).view(*by_head.shape[:3], -1).transpose(1, 2)
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale, ctx.blocks = scale, blocks
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
        for (queries, keys), probabilities in zip(ctx.blocks, kept, strict=True):
            mine = dout[:, queries]
            # A product and a sum: baddbmm_ into a part of a tensor would run one matrix at a time.
            _add_rows(dv, keys, torch.bmm(probabilities.transpose(1, 2), mine))
            dscores = torch.bmm(mine, v[:, keys].transpose(1, 2)).sub_(mean[:, queries])
            dscores.mul_(probabilities)
            dq[:, queries] = torch.bmm(dscores, k[:, keys])
            _add_rows(dk, keys, torch.bmm(dscores.transpose(1, 2), q[:, queries]))
        dq, dk, dv = (t.view(batch, heads, seq, -1) for t in (dq.mul_(ctx.scale), dk, dv))
        return dq, dk, dv, None, None, None
