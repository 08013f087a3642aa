"""Multi-head Latent Attention (DeepSeek-V3, arXiv:2412.19437, §2.1.1), naive form for training.

Keys and values are expanded from a shared latent of `kv_lora_rank` features; position lives in a separate rotary key
of `qk_rope_head_dim` features that all heads share. Decoding uses the absorbed form (`model.generate.decode`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.core import softmax_attention
from model.config import ModelConfig
from model.layers.norm import RMSNorm
from model.layers.rope import apply_rotary, softmax_scale


class MultiHeadLatentAttention(nn.Module):
    """[batch, seq, hidden_size] -> same. Parameter names and shapes are Hugging Face's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # V3 fixes the latent norms' eps
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, expanded, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.scale = softmax_scale(config)

    def queries(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, heads, qk_head_dim], not yet rotated (eqs. 6-9)."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within documents.

        Args:
            x: [batch, seq, hidden_size].
            rotation: complex [batch or 1, seq, qk_rope_head_dim / 2].
            mask: bool [batch, 1, seq, seq], or None for plain causal attention.
        """
        config = self.config
        q_nope, q_rope = self.queries(x).split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        k_rope = apply_rotary(k_rope.unsqueeze(2), rotation).expand(*k_nope.shape[:3], -1)
        q = torch.cat([q_nope, apply_rotary(q_rope, rotation)], -1)
        k = torch.cat([k_nope, k_rope], -1)
        out = softmax_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))
