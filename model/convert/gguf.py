"""A model as one GGUF file of architecture `deepseek2`, which llama.cpp runs.

MLA is written in absorbed form (one key-value head: the latent), as llama.cpp's own converter does. MTP modules are
left out: llama.cpp does not read them for this architecture. The `gguf` package is imported when a file is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.gguf_rules import check_gguf
from model.convert.gguf_tokenizer import GgufTokenizer, read_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

GgufType = Literal["f32", "f16", "q8_0"]
Q8_BLOCK = 32  # features that share a scale; narrower rows cannot be quantised

_ATTENTION = {
    "q_proj": "attn_q",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "o_proj": "attn_output",
}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def gguf_tensors(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformer state dict -> llama.cpp's names and layouts, MTP left out."""
    out = {
        "token_embd.weight": state["embed_tokens.weight"],
        "output_norm.weight": state["norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        own = {k.removeprefix(f"layers.{layer}."): v for k, v in state.items() if k.startswith(f"layers.{layer}.")}
        out |= {f"blk.{layer}.{name}": tensor for name, tensor in _layer_tensors(config, own).items()}
    return out


def _layer_tensors(config: ModelConfig, own: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "attn_norm.weight": own["input_layernorm.weight"],
        "ffn_norm.weight": own["post_attention_layernorm.weight"],
    }
    for ours, theirs in _ATTENTION.items():
        if f"self_attn.{ours}.weight" in own:
            out[f"{theirs}.weight"] = own[f"self_attn.{ours}.weight"]
    key, value = (
        own["self_attn.kv_b_proj.weight"]
        .unflatten(0, (config.num_attention_heads, -1))
        .split([config.qk_nope_head_dim, config.v_head_dim], 1)
    )
    out["attn_k_b.weight"], out["attn_v_b.weight"] = key.transpose(1, 2), value
    for ours, theirs in _MLP.items():
        for prefix, suffix in (("mlp.", ""), ("mlp.shared_experts.", "_shexp")):
            if f"{prefix}{ours}.weight" in own:
                out[f"{theirs}{suffix}.weight"] = own[f"{prefix}{ours}.weight"]
    if "mlp.gate.weight" in own:
        gate, up = own["mlp.experts.gate_up_proj"].chunk(2, 1)
        out |= {
            "ffn_gate_exps.weight": gate,
            "ffn_up_exps.weight": up,
            "ffn_down_exps.weight": own["mlp.experts.down_proj"],
        }
        out["ffn_gate_inp.weight"] = own["mlp.gate.weight"]
        if "mlp.gate.e_score_correction_bias" in own:
            out["exp_probs_b.bias"] = own["mlp.gate.e_score_correction_bias"]
    return out


def _add_architecture(w: GGUFWriter, config: ModelConfig) -> None:
    from gguf import ExpertGatingFuncType, RopeScalingType

    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_vocab_size(config.vocab_size)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Absorbed MLA is multi-query attention over the latent; the *_mla keys keep the widths of the unabsorbed heads.
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(1)
    w.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    w.add_value_length(config.kv_lora_rank)
    w.add_key_length_mla(config.qk_head_dim)
    w.add_value_length_mla(config.v_head_dim)
    w.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        w.add_q_lora_rank(config.q_lora_rank)
    w.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    w.add_expert_feed_forward_length(config.moe_intermediate_size)
    w.add_expert_count(config.n_routed_experts)
    w.add_expert_used_count(config.num_experts_per_tok)
    w.add_expert_shared_count(config.n_shared_experts)
    w.add_expert_weights_scale(config.routed_scaling_factor)
    w.add_expert_weights_norm(config.norm_topk_prob)
    # Unstated, llama.cpp takes softmax and is silently wrong for V3.
    w.add_expert_gating_func(ExpertGatingFuncType[config.scoring_func.upper()])
    if config.n_group > 1 and config.topk_method == "noaux_tc":
        w.add_expert_group_count(config.n_group)
        w.add_expert_group_used_count(config.topk_group)
    w.add_rope_dimension_count(config.qk_rope_head_dim)
    w.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling.factor)
        w.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        w.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        w.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        w.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def _add_tokenizer(w: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(tokenizer.pre)
    w.add_token_list(tokenizer.tokens)
    w.add_token_types(tokenizer.types)
    w.add_token_merges(tokenizer.merges)
    for name, add in (("bos", w.add_bos_token_id), ("eos", w.add_eos_token_id), ("pad", w.add_pad_token_id)):
        if name in tokenizer.special:
            add(tokenizer.special[name])
    w.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        w.add_chat_template(tokenizer.chat_template)


def _add_tensor(w: GGUFWriter, name: str, tensor: Tensor, kind: GgufType) -> None:
    from gguf import GGMLQuantizationType, quants

    values: np.ndarray[Any, Any] = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
    if values.ndim == 1 or "ffn_gate_inp" in name or kind == "f32":
        w.add_tensor(name, values)
    elif kind == "q8_0" and values.shape[-1] % Q8_BLOCK == 0:
        quantised = quants.quantize(values, GGMLQuantizationType.Q8_0)
        w.add_tensor(name, quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    else:
        w.add_tensor(name, values.astype(np.float16))


def save_gguf(
    path: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    *,
    kind: GgufType,
    tokenizer_folder: Path,
    name: str,
    licence: str,
) -> None:
    """Write `path`, which the caller moves into place when this returns.

    Args:
        kind: f32; f16; or q8_0, where rows that are no multiple of 32 wide stay f16. Norms and the router stay f32.
    Raises:
        ValueError: from `check_gguf`, or for a tokenizer that llama.cpp would split differently.
    """
    from gguf import GGUFWriter, LlamaFileType

    check_gguf(config)
    tokenizer = read_tokenizer(tokenizer_folder, config.vocab_size)
    file_type = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[kind]
    w = GGUFWriter(path, "deepseek2")
    try:
        w.add_name(name)
        w.add_license(licence)
        w.add_file_type(file_type)
        w.add_quantization_version(2)
        _add_architecture(w, config)
        _add_tokenizer(w, tokenizer)
        for tensor_name, tensor in gguf_tensors(config, state).items():
            _add_tensor(w, tensor_name, tensor, kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
    finally:
        w.close()
