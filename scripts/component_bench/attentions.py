"""MQA, GQA and MLA: our modules, the papers' equations, and transformers' layers with torch's fused attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.kinds import build_attention
from model.config import ModelConfig
from model.layers.rope import rotary_table
from scripts.component_bench.form import BATCH, TOKENS, WIDTH, Component, Form, Named

HEADS, HEAD_DIM = 8, 64
COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": TOKENS}
LATENT = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}


def inputs(seed: int = 0) -> Tensor:
    """Hidden states [4, 64, 512]."""
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def fill(module: nn.Module) -> nn.Module:
    """Weights as after some training: matrices of 1 / sqrt(features read), the rest near one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1 + 0.1 * noise)
    return module


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864, eq. 34): x [batch, heads, seq, dim], angle [seq, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v (arXiv:1706.03762, eq. 1) of heads, side by side in [batch, seq, width]."""
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, dim: int) -> Tensor:
    """[batch, seq, heads * dim] -> [batch, heads, seq, dim]."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def grouped(kind: str, kv_heads: int) -> Component:
    """`mqa` (arXiv:1911.02150) or `gqa` (arXiv:2305.13245)."""
    config = ModelConfig(attention=kind, head_dim=HEAD_DIM, num_key_value_heads=kv_heads, **COMMON)  # type: ignore[arg-type]
    ours = fill(build_attention(config))
    weights, rotation = dict(ours.named_parameters()), rotary_table(config).unsqueeze(0)
    angle = rotation[0].angle()

    def plain(x: Tensor) -> Tensor:
        if kind == "mqa":
            k, v = F.linear(x, weights["kv_proj_with_mqa.weight"]).chunk(2, -1)
        else:
            k, v = F.linear(x, weights["k_proj.weight"]), F.linear(x, weights["v_proj.weight"])
        q = turned(heads(F.linear(x, weights["q_proj.weight"]), HEAD_DIM), angle)
        k, v = turned(heads(k, HEAD_DIM), angle), heads(v, HEAD_DIM)
        k, v = (part.repeat_interleave(HEADS // kv_heads, 1) for part in (k, v))
        return F.linear(attend(q, k, v), weights["o_proj.weight"])

    forms = {
        "ours": Form(lambda x: ours(x, rotation, None), weights),
        "plain": Form(plain, weights),
        "transformers Llama, sdpa": _llama(weights, kv_heads, angle),
    }
    return Component("arXiv:1911.02150" if kind == "mqa" else "arXiv:2305.13245", inputs(), forms)


def _halves(weight: Tensor) -> Tensor:
    """Rows of heads whose pairs lie side by side -> the first of all pairs, then the second: Llama's order."""
    return weight.unflatten(0, (-1, HEAD_DIM // 2, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor) -> Tensor:
    """The way back."""
    return weight.unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).flatten(0, 2)


def _llama(weights: Named, kv_heads: int, angle: Tensor) -> Form:
    """transformers' LlamaAttention with the same weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=kv_heads)
    config._attn_implementation = "sdpa"
    peer = LlamaAttention(config, 0)
    together = weights.get("kv_proj_with_mqa.weight")
    k, v = together.chunk(2) if together is not None else (weights["k_proj.weight"], weights["v_proj.weight"])
    with torch.no_grad():
        peer.q_proj.weight.copy_(_halves(weights["q_proj.weight"]))
        peer.k_proj.weight.copy_(_halves(k))
        peer.v_proj.weight.copy_(v)
        peer.o_proj.weight.copy_(weights["o_proj.weight"])
    both = torch.cat([angle, angle], -1).unsqueeze(0)
    positions = (both.cos(), both.sin())

    def as_ours(gradients: Named) -> Named:
        out = gradients | {name: _pairs(gradients[name]) for name in ("q_proj.weight", "k_proj.weight")}
        if together is None:
            return out
        parts = [out.pop("k_proj.weight"), out.pop("v_proj.weight")]
        return out | {"kv_proj_with_mqa.weight": torch.cat(parts)}

    return Form(lambda x: peer(x, positions, None)[0], dict(peer.named_parameters()), as_ours)


def latent() -> Component:
    """MLA (DeepSeek-V2, arXiv:2405.04434, eqs. 9-19), with latent queries."""
    config = ModelConfig(attention="mla", **LATENT, **COMMON)
    ours = fill(build_attention(config))
    weights, rotation = dict(ours.named_parameters()), rotary_table(config).unsqueeze(0)
    angle = rotation[0].angle()

    def plain(x: Tensor) -> Tensor:
        def norm(value: Tensor, name: str) -> Tensor:
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

        q = F.linear(norm(F.linear(x, weights["q_a_proj.weight"]), "q_a_layernorm.weight"), weights["q_b_proj.weight"])
        q_nope, q_rope = heads(q, config.qk_head_dim).split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        both = F.linear(x, weights["kv_a_proj_with_mqa.weight"])
        c_kv, k_rope = both.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        kv = F.linear(norm(c_kv, "kv_a_layernorm.weight"), weights["kv_b_proj.weight"])
        k_nope, v = heads(kv, config.qk_nope_head_dim + config.v_head_dim).split(
            [config.qk_nope_head_dim, config.v_head_dim], -1
        )
        shared = turned(k_rope.unsqueeze(1), angle).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q_nope, turned(q_rope, angle)], -1), torch.cat([k_nope, shared], -1)
        return F.linear(attend(q, k, v), weights["o_proj.weight"])

    forms = {
        "ours": Form(lambda x: ours(x, rotation, None), weights),
        "plain": Form(plain, weights),
        "transformers DeepseekV3, sdpa": _deepseek(ours, angle),
    }
    return Component("arXiv:2405.04434", inputs(), forms)


def _deepseek(ours: nn.Module, angle: Tensor) -> Form:
    """transformers' DeepseekV3Attention with the same weights, whose names and layout are ours."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, **LATENT)
    config._attn_implementation = "sdpa"
    peer = DeepseekV3Attention(config, 0)
    peer.load_state_dict(ours.state_dict())
    both = torch.cat([angle, angle], -1).unsqueeze(0)
    positions = (both.cos(), both.sin())
    return Form(lambda x: peer(x, positions, None)[0], dict(peer.named_parameters()))
