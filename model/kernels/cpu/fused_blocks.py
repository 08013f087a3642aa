"""Attention by blocks of queries in torch's fused CPU kernel, which keeps no probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu.blocks import Part, add_rows, bias_of


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
            dk = add_rows(dk, rows, keys, dk_part, k)
            dv = add_rows(dv, rows, keys, dv_part, v)
        assert dv is not None
        return dq, dk, dv[..., : ctx.v_dim], None, None, None


def _hidden(mask: Tensor | None, part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """How the fused kernel is told what a part does not see."""
    if part.causal and isinstance(part.keys, slice) and part.keys.start == part.queries.start:
        return {"is_causal": True}
    return {"attn_mask": bias_of(mask, part).to(dtype)}
