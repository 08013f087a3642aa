"""Attention with keys and values per head or group of heads, for one new token a row over a cache of both.

A column of the cache holds the rotated keys of all key heads, then their values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.cope import position_logits
from model.attention.core import attention_of_scores, grouped_scores
from model.attention.grouped import GroupedAttention
from model.generate.absorbed import added_over_ranks, rotate_in_place
from model.kernels.cpu.products import factor
from model.layers.rope import apply_rotary


class GroupedStep:
    """One layer's attention for one new token a row. Weights are stored [in, out], or read in place.

    Attributes:
        heads, groups: queries, and keys and values, of this rank.
    """

    def __init__(self, attention: GroupedAttention, *, in_place: bool = False):
        config = self.config = attention.config
        self.inner, shared = attention, config.attention == "mqa"
        self.heads = config.num_attention_heads // attention.tp.size
        self.groups = config.num_kv_heads // (1 if shared else attention.tp.size)
        self.keys = self.groups * config.head_dim
        self.width = 2 * self.keys
        of_keys = (attention.kv_proj_with_mqa,) if shared else (attention.k_proj, attention.v_proj)
        self.project = factor(*(part.weight for part in (attention.q_proj, *of_keys)), in_place=in_place)
        self.out = factor(attention.o_proj.weight, in_place=in_place)

    def remember(self, y: Tensor, rotation: Tensor, into: Tensor, values: Tensor | None = None) -> None:
        """Keys and values of a prefix: y [rows, n, hidden_size] into [rows, n, width]."""
        k, v = self.inner.keys_and_values(y, y, values)
        if self.config.position == "rope":
            k = apply_rotary(k.unflatten(2, (-1, self.config.head_dim)), rotation).flatten(2)
        into[:, :, : self.keys] = k
        into[:, :, self.keys :] = v

    def step(
        self, x: Tensor, residual: Tensor, rotation: Tensor, cache: Tensor, bias: Tensor, column: int,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `DecodeAttention.step`."""
        heads, dim = self.heads, self.config.head_dim
        projected = self.projected(x, values)
        if self.config.position == "rope":  # queries and keys alike
            rotate_in_place(projected[:, : heads * dim + self.keys].unflatten(1, (-1, dim)), rotation)
        q = projected[:, : heads * dim].unflatten(1, (heads, dim))
        cache[:, column] = projected[:, heads * dim :]
        out = self.attend(q, cache[:, : column + 1], bias)
        return self.leave(residual, out.flatten(1))

    def leave(self, residual: Tensor, o: Tensor) -> Tensor:
        """As `AbsorbedAttention.leave`."""
        return added_over_ranks(residual, o, self.out, self.inner.tp)

    def projected(self, x: Tensor, values: Tensor | None) -> Tensor:
        """Queries, keys and values side by side: x [tokens, hidden_size], added values [tokens, kv_heads, head_dim]."""
        out = self.project.product(x)
        if values is not None:
            out[:, -self.keys :] += values.flatten(1)
        return out

    def attend(self, q: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """q [rows, heads, head_dim]; seen [rows, n, width]; bias [rows, 1, n] -> the shape of q."""
        k, v = self._keys_and_values(seen)
        # The queries of a group take the place of positions: the kernel reads each key head once, where it lies.
        groups = q.unflatten(1, (k.shape[1], -1))
        out = F.scaled_dot_product_attention(groups, k, v, attn_mask=bias.unsqueeze(1), scale=self.inner.scale)
        return out.flatten(1, 2)

    def _keys_and_values(self, seen: Tensor) -> tuple[Tensor, ...]:
        """Views [rows, kv_heads, n, head_dim] of the cache."""
        return seen.unflatten(2, (2, -1, self.config.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


class ContextualStep(GroupedStep):
    """With contextual positions (`model.attention.cope`) in place of rotary ones."""

    def attend(self, q: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        k, v = self._keys_and_values(seen)
        scores = grouped_scores(q.unsqueeze(2), k).float() * self.inner.scale + bias.unsqueeze(1).float()
        positions = q @ self.inner.position_embedding.t()
        return attention_of_scores(scores + position_logits(scores, positions.unsqueeze(2)), v).squeeze(2)


class SlidingStep(GroupedStep):
    """Reads the window and the strided tokens before it, not the whole cache."""

    def attend(self, q: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        stride, first = self.config.global_stride, seen.shape[1] - self.config.sliding_window
        if first <= 0:
            return super().attend(q, seen, bias)
        padding = torch.isneginf(bias[:, 0]).sum(1)  # rows begin in different columns
        far = padding[:, None] + torch.arange(0, first, stride, device=seen.device)
        visible = torch.where(far < first, 0.0, -torch.inf).to(bias.dtype).unsqueeze(1)
        index = far.clamp(max=first - 1).unsqueeze(2).expand(-1, -1, seen.shape[2])
        seen = torch.cat([seen.gather(1, index), seen[:, first:]], 1)
        return super().attend(q, seen, torch.cat([visible, bias[:, :, first:]], 2))
