"""Tiny models for the tests of decoding."""

from __future__ import annotations

import dataclasses

import torch

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [4, 4, 4, 4], [1, 2, 3]]

# Every kind of attention and what else changes a decoding step.
KINDS = {
    "mla": TINY,
    "q_lora_none": dataclasses.replace(TINY, q_lora_rank=None),
    "wide_latent": dataclasses.replace(TINY, kv_lora_rank=24),
    "odd_widths": dataclasses.replace(TINY, kv_lora_rank=15, qk_nope_head_dim=7, v_head_dim=5),
    "mla_cope": dataclasses.replace(TINY, position="cope", cope_positions=8),
    "mha": dataclasses.replace(TINY, attention="mha", head_dim=8),
    "gqa": dataclasses.replace(TINY, attention="gqa", head_dim=8, num_attention_heads=4, num_key_value_heads=2),
    "mqa_cope": dataclasses.replace(TINY, attention="mqa", head_dim=8, position="cope", cope_positions=8),
    "sliding": dataclasses.replace(TINY, attention="sliding", head_dim=8, sliding_window=4, global_stride=3),
    "dsa": dataclasses.replace(TINY, attention="dsa", index_head_dim=8, index_n_heads=2, index_topk=4),
    "dsa_odd_widths": dataclasses.replace(
        TINY, attention="dsa", kv_lora_rank=15, index_head_dim=9, index_n_heads=2, index_topk=4
    ),
    "dyt": dataclasses.replace(TINY, norm="dyt"),
    "recursion": dataclasses.replace(TINY, recursion_depth=2),
}


def build(config: ModelConfig) -> Transformer:
    """Random weights, balancing biases included."""
    model = Transformer(config)
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def build_agreeing(config: ModelConfig) -> Transformer:
    """A model whose MTP modules often, but not always, say what it will say itself (with RMSNorm and one pass).

    Every block adds little to the residual stream, and the modules pass the next token's embedding on.
    """
    model = build(config)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.mul_(0.4)
        if name.endswith("eh_proj.weight"):
            parameter.mul_(0.2)
            parameter[:, : config.hidden_size] += torch.eye(config.hidden_size)
    return model


@torch.no_grad()
def greedy_uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from a run over the whole row."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]
