"""A small model as a Hugging Face folder, for the tests of reading one."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.convert.hf import save_hf
from model.init import init_weights
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip


def written(tmp_path: Path, **options) -> Path:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    model = built()
    save_hf(tmp_path / "hf", CONFIG, model.state_dict(), tokenizer_folder=tokenizer, model_card="", **options)
    return tmp_path / "hf"


def built() -> Transformer:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=1)
    return model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
