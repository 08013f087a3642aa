"""A GGUF file read back: config and weights, dequantised, as our model has them. The `gguf` package reads the file.

Only files that hold everything under the names of `gguf_tensors` are read: this project's, and those of llama.cpp's
converter for DeepSeek-V2, V3 and V3.2 in absorbed form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.convert.gguf_tensors import gguf_names, joined
from model.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = ("deepseek2", "deepseek32")
_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_attention_heads": "attention.head_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "v_head_dim": "attention.value_length_mla",
    "qk_rope_head_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "first_k_dense_replace": "leading_dense_block_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
}
_GATES = {1: "softmax", 2: "sigmoid"}


def load_gguf(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and Transformer state dict in fp32.

    Raises:
        ValueError: an architecture that is none of ours, or a key or tensor that is missing, of another shape, or of a
            type that cannot be read.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(path, fields)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    return config, _state(path, config, shapes, reader)


def _config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is none of {', '.join(ARCHITECTURES)}, which are read")

    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{path}: the key {architecture}.{key} is missing")
        return found

    values = {ours: value(theirs) for ours, theirs in _KEYS.items()}
    ahead = int(value("nextn_predict_layers", 0))
    gate = _GATES.get(int(value("expert_gating_func", 1)))
    sigmoid = gate == "sigmoid"
    groups = int(value("expert_group_count", 1))
    values |= {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "num_hidden_layers": int(value("block_count")) - ahead,
        "num_nextn_predict_layers": ahead,
        "q_lora_rank": fields.get(f"{architecture}.attention.q_lora_rank"),
        "qk_nope_head_dim": int(value("attention.key_length_mla")) - int(value("rope.dimension_count")),
        "routed_scaling_factor": value("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(value("expert_weights_norm", False)),
        "scoring_func": gate,
        "topk_method": "noaux_tc" if sigmoid else "greedy",
        "n_group": groups,
        "topk_group": int(value("expert_group_used_count", groups)),
        "rope_scaling": _scaling(architecture, fields),
    }
    if architecture == "deepseek32":
        indexer = {"index_n_heads": "head_count", "index_head_dim": "key_length", "index_topk": "top_k"}
        values |= {ours: value(f"attention.indexer.{theirs}") for ours, theirs in indexer.items()} | {
            "attention": "dsa"
        }
    config = ModelConfig(**values)
    config.validate()
    return config


def _scaling(architecture: str, fields: dict[str, Any]) -> RopeScaling | None:
    prefix = f"{architecture}.rope.scaling."
    if fields.get(f"{prefix}type") != "yarn":
        return None
    scale = round(float(fields.get(f"{prefix}yarn_log_multiplier", 0.1)) / 0.1, 6)
    return RopeScaling(
        factor=float(fields[f"{prefix}factor"]),
        original_max_position_embeddings=int(fields[f"{prefix}original_context_length"]),
        beta_fast=float(fields.get(f"{prefix}yarn_beta_fast", 32.0)),
        beta_slow=float(fields.get(f"{prefix}yarn_beta_slow", 1.0)),
        mscale=scale,
        mscale_all_dim=scale,
    )


def _state(path: Path, config: ModelConfig, shapes: dict[str, torch.Size], reader: GGUFReader) -> dict[str, Tensor]:
    from gguf import quants

    stored = {tensor.name: tensor for tensor in reader.tensors}
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        parts = []
        for part in gguf_names(config, name):
            if part not in stored:
                raise ValueError(f"{path}: the tensor {part} is missing")
            tensor = stored[part]
            try:
                values = quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(f"{path}: {part} is of type {tensor.tensor_type.name}, which cannot be read") from None
            size = [int(n) for n in reversed(tensor.shape)]
            if values.size != math.prod(size):
                raise ValueError(f"{path}: {part} has {values.size} numbers, its shape {size} asks for another number")
            parts.append(torch.from_numpy(np.array(values, np.float32)).reshape(size))
        whole = joined(config, name, parts)
        if whole.shape != shape:
            raise ValueError(f"{path}: {name} has shape {list(whole.shape)}, its keys ask for {list(shape)}")
        if not bool(whole.isfinite().all()):
            raise ValueError(f"{path}: {name} holds a number that is not finite")
        out[name] = whole
    return out
