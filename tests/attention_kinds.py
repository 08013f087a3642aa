"""Attention modules of every kind for tests, small, with random weights everywhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.attention.core import document_positions
from model.attention.kinds import build_attention, visible_tokens
from model.config import ModelConfig
from model.layers.rope import rotary_table

SMALL = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=8, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    head_dim=8, n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.25,
    sliding_window=5, global_stride=4, cope_positions=6,
)  # fmt: skip
GQA = replace(SMALL, attention="gqa", num_key_value_heads=2)
KINDS = {
    "mla": SMALL,
    "dsa": replace(SMALL, attention="dsa", index_topk=6),
    "mha": replace(SMALL, attention="mha"),
    "gqa": GQA,
    "mqa": replace(SMALL, attention="mqa"),
    "sliding": replace(SMALL, attention="sliding"),
    "sliding, grouped": replace(GQA, attention="sliding"),
    "mla, cope": replace(SMALL, position="cope"),
    "mla without query latent, cope": replace(SMALL, q_lora_rank=None, position="cope"),
    "mha, cope": replace(SMALL, attention="mha", position="cope"),
    "gqa, cope": replace(GQA, position="cope"),
    "mqa, cope": replace(SMALL, attention="mqa", position="cope"),
}


def randomise(module: nn.Module, seed: int = 1, std: float = 0.25) -> None:
    """Every parameter from N(0, std), norms' around one; tables of positions too, which really start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(drawn + 1 if parameter.dim() == 1 else drawn)


def built(config: ModelConfig) -> nn.Module:
    attention = build_attention(config)
    randomise(attention)
    return attention


def inputs(config: ModelConfig, doc_ids: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, rotation and mask of rows with documents `doc_ids` [batch, seq]."""
    x = torch.randn(*doc_ids.shape, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    rotation = rotary_table(config)[document_positions(doc_ids)]
    return x, rotation, visible_tokens(config, doc_ids, doc_ids.shape[1], x.device)
