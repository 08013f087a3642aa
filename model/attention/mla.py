"""Multi-head Latent Attention (DeepSeek-V3, arXiv:2412.19437, §2.1.1), naive form for training.

Keys and values are expanded from a shared latent of `kv_lora_rank` features; position lives in a separate rotary key
of `qk_rope_head_dim` features that all heads share. With contextual positions (arXiv:2405.18719) nothing turns: that
key is one more shared key. Decoding uses the absorbed form (`model.generate.absorbed`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.cope import contextual_attention
from model.attention.core import softmax_attention
from model.config import ModelConfig
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import apply_rotary, softmax_scale
from model.parallel.collectives import LOCAL, Axis, copy_to, heads_for_positions, positions_for_heads, reduce_from


class MultiHeadLatentAttention(nn.Module):
    """[batch, seq, hidden_size] -> same. Parameter names and shapes are Hugging Face's.

    Heads are cut over tp; under sequence parallelism each rank has its positions of a row outside attention, and some
    heads of all positions inside it.
    """

    tp: Axis = LOCAL
    sp: Axis = LOCAL

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # V3 fixes the latent norms' eps
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, expanded)
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.scale = softmax_scale(config)
        if config.position == "cope":
            self.position_embedding = nn.Parameter(torch.zeros(config.cope_positions, config.qk_head_dim))

    def queries(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, heads / tp, qk_head_dim], not yet rotated (eqs. 6-9)."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(copy_to(x, self.tp))
        else:
            q = self.q_b_proj(copy_to(self.q_a_layernorm(self.q_a_proj(x)), self.tp))
        return q.unflatten(-1, (-1, self.config.qk_head_dim))

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within documents.

        Args:
            x: [batch, seq / sp, hidden_size].
            rotation: complex [batch or 1, seq / sp, qk_rope_head_dim / 2]; contextual positions leave it aside.
            mask: bool [batch, 1, seq, seq], or None for plain causal attention.
        """
        config = self.config
        q_nope, q_rope = self.queries(x).split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        # Every rank has the whole latent; each expands its own heads from it.
        latent, k_rope = copy_to(self.kv_a_layernorm(latent), self.tp), copy_to(k_rope, self.tp)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k_rope = k_rope.unsqueeze(2)
        if config.position == "rope":
            q_rope, k_rope = apply_rotary(q_rope, rotation), apply_rotary(k_rope, rotation)
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:3], -1)], -1)
        if self.sp.size > 1:  # one message for all three
            widths = [q.shape[-1], k.shape[-1], v.shape[-1]]
            q, k, v = heads_for_positions(torch.cat([q, k, v], -1), self.sp).split(widths, -1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if config.position == "cope":
            # Each rank has the whole table and uses it for its heads alone.
            table = copy_to(self.position_embedding, self.tp)
            out = contextual_attention(q, k, v, table, scale=self.scale, mask=mask)
        else:
            out = softmax_attention(q, k, v, scale=self.scale, mask=mask)
        out = positions_for_heads(out.transpose(1, 2), self.sp)
        return reduce_from(self.o_proj(out.flatten(2)), self.tp)
