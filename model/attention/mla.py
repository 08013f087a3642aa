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
from model.layers.auxiliary import EVERY_TOKEN, Counting
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

    def query_latent(self, x: Tensor) -> Tensor:
        """What queries are expanded from: [batch, seq, q_lora_rank] (eq. 6), or x itself where there is no rank."""
        return x if self.config.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))

    def heads(
        self, query_latent: Tensor, x: Tensor, rotation: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of whole rows (eqs. 1-9): [batch, seq, heads / (tp * sp), width].

        `values` as `forward` takes it.
        """
        config = self.config
        expand = self.q_proj if config.q_lora_rank is None else self.q_b_proj
        q = expand(copy_to(query_latent, self.tp)).unflatten(-1, (-1, config.qk_head_dim))
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        # Every rank has the whole latent; each expands its own heads from it.
        latent, k_rope = copy_to(self.kv_a_layernorm(latent), self.tp), copy_to(k_rope, self.tp)
        kv = self.kv_b_proj(latent).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        v = v if values is None else v + values
        k_rope = k_rope.unsqueeze(2)
        if config.position == "rope":
            q_rope, k_rope = apply_rotary(q_rope, rotation), apply_rotary(k_rope, rotation)
        q = torch.cat([q_nope, q_rope], -1)
        k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:3], -1)], -1)
        if self.sp.size == 1:
            return q, k, v
        widths = [q.shape[-1], k.shape[-1], v.shape[-1]]  # one message for all three
        q, k, v = heads_for_positions(torch.cat([q, k, v], -1), self.sp).split(widths, -1)
        return q, k, v

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, counting: Counting = EVERY_TOKEN,
        values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within documents.

        Args:
            x: [batch, seq / sp, hidden_size].
            rotation: complex [batch or 1, seq / sp, qk_rope_head_dim / 2]; contextual positions leave it aside.
            mask: bool [batch, 1, seq, seq], or None for plain causal attention.
            counting: of no use here, as there is no loss of this layer alone.
            values: [batch, seq / sp, heads / tp, v_head_dim], added to the values.
        """
        q, k, v = (t.transpose(1, 2) for t in self.heads(self.query_latent(x), x, rotation, values))
        if self.config.position == "cope":
            # Each rank has the whole table and uses it for its heads alone.
            table = copy_to(self.position_embedding, self.tp)
            out = contextual_attention(q, k, v, table, scale=self.scale, mask=mask)
        else:
            out = softmax_attention(q, k, v, scale=self.scale, mask=mask, documents=True)
        out = positions_for_heads(out.transpose(1, 2), self.sp)
        return reduce_from(self.o_proj(out.flatten(2)), self.tp)
