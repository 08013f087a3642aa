"""A tiny model to sample from, here and in actors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.rollouts.decoder_sampler import DecoderSampler, SamplingRules
from ray_pipeline.rollouts.rollout import SampleRequest

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=4, max_position_embeddings=96, initializer_range=0.2,
)  # fmt: skip
RULES = SamplingRules(max_new_tokens=20, record_routing=True)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """A whole state dict."""
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=seed)
    return model.state_dict()


def save_tokenizer(folder: Path, *, tools: bool = False) -> Path:
    """A trained tokenizer in `folder/tokenizer`."""
    texts = ["What is 12 + 34 * 5? <think>12</think> The answer is 46."] * 4
    save_trained(train_bpe(texts, CONFIG.vocab_size, tools=tools), folder / "tokenizer")
    return folder / "tokenizer"


def builder(tokenizer: Path, rules: SamplingRules = RULES) -> Callable[[], DecoderSampler]:
    """What an engine makes its samplers with."""
    return functools.partial(DecoderSampler.build, CONFIG, tokenizer, rules, torch.device("cpu"))


def requests(count: int) -> list[SampleRequest]:
    """Prompts of different lengths, each twice."""
    return [SampleRequest([5 + i // 2, *range(10, 12 + i // 2 % 7)], seed=100 + i) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
