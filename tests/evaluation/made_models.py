"""Tiny model folders with a real tokenizer: ours as a published folder, in our own format, and another architecture."""

from __future__ import annotations

from pathlib import Path

import torch

from model.config import ModelConfig
from model.convert.hf import save_hf
from model.convert.native import save_native
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe

TEXT = ["the cat sat on the mat", "What is 12+34? two and two make four", "A. yes B. no Answer with the letter alone."]
VOCAB = 320
TINY = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    max_position_embeddings=160,
    initializer_range=0.3,
)
# As small as GGUF's blocks of 32 numbers allow.
EXPORTABLE = ModelConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=32,
    n_routed_experts=4,
    max_position_embeddings=128,
    initializer_range=0.1,
)


def save_tokenizer(folder: Path) -> Path:
    """A trained one with the chat template."""
    save_trained(train_bpe(TEXT * 20, VOCAB), folder)
    return folder


def save_ours(folder: Path, *, native: bool = False, seed: int = 0) -> Path:
    """Our architecture as a Hugging Face folder (DeepSeek-V3), or in this project's own format."""
    model = Transformer(TINY)
    init_weights(model, TINY, seed=seed)
    tokenizer = save_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    folder.mkdir(parents=True)
    save = save_native if native else save_hf
    save(
        folder, TINY, model.state_dict(), tokenizer_folder=tokenizer, dtype=torch.float32, model_card="", generation={}
    )
    return folder


def save_qwen(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2, as R1's distills are, with a generation config that must not be used."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[1, 40]
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
