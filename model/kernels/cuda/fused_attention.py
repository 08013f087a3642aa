"""Softmax attention in the fused kernel of a GPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None, documents: bool
) -> Tensor:
    """As `model.kernels.plain.attention`; keys and values of a group of heads are repeated."""
    width, groups = v.shape[-1], q.shape[1] // k.shape[1]
    if width < q.shape[-1]:
        # Fused kernels want equal widths; with unequal ones torch falls back to the slow math path.
        v = F.pad(v, (0, q.shape[-1] - width))
    if groups > 1:  # with a mask the kernel does not read one key head for several query heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]
