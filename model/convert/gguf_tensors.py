"""Our parameters under llama.cpp's names and layouts: architectures `deepseek2` and `deepseek32` (V3.2).

MLA is in absorbed form (one key-value head: the latent), as in llama.cpp's own converter. The MTP module is the block
behind the last layer; llama.cpp drafts with one, so deeper ones stay out.
"""

from __future__ import annotations

from torch import Tensor

from model.config import ModelConfig

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_MTP = {
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "shared_head_norm.weight": "nextn.shared_head_norm.weight",
}
# Parameters that are several tensors in the file.
KV_B, GATE_UP = "self_attn.kv_b_proj.weight", "mlp.experts.gate_up_proj"
SPLIT = {KV_B: ("attn_k_b.weight", "attn_v_b.weight"), GATE_UP: ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


def mtp_modules(config: ModelConfig) -> int:
    """How many MTP modules a file carries: llama.cpp drafts with one, whose block must route to experts and have a
    latent query."""
    usable = config.q_lora_rank is not None and config.is_moe_layer(config.num_hidden_layers)
    return min(config.num_nextn_predict_layers, 1) if usable else 0


def place(config: ModelConfig, name: str) -> tuple[str, str] | None:
    """A parameter's block in the file as a prefix ("blk.3.", or none) and its name within; None where it stays out."""
    if name.startswith("mtp."):
        _, depth, rest = name.split(".", 2)
        if int(depth) >= mtp_modules(config):
            return None
        return f"blk.{config.num_hidden_layers + int(depth)}.", rest.removeprefix("block.")
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.", rest
    return "", name


def gguf_names(config: ModelConfig, name: str) -> tuple[str, ...]:
    """What a parameter is called in the file: one tensor, the two it is split into, or none."""
    found = place(config, name)
    if found is None:
        return ()
    prefix, rest = found
    known = _BLOCK | _MTP if prefix else _TOP
    return tuple(prefix + part for part in SPLIT.get(rest) or (known[rest],))


def gguf_tensors(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformer state dict -> llama.cpp's names and layouts."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = gguf_names(config, name)
        out |= dict(zip(names, _parts(config, name, tensor), strict=True)) if names else {}
    return out


def _parts(config: ModelConfig, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    if name.endswith(KV_B):
        heads = tensor.unflatten(0, (config.num_attention_heads, -1))
        key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        return key.transpose(1, 2), value
    if name.endswith(GATE_UP):
        gate, up = tensor.chunk(2, 1)
        return gate, up
    return (tensor,)
