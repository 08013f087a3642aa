"""Learned shares of the residual stream and of the embedding: the formula, where they start, what exports say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.convert.gguf_rules import check_gguf
from model.convert.hf_config import published_family, unpublished_reason
from model.init import init_weights
from model.transformer import Transformer

PLAIN = ModelConfig(vocab_size=48, hidden_size=32, num_hidden_layers=3, max_position_embeddings=32)
SCALED = replace(PLAIN, residual_scales=True)


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, config, seed=1)
    return model.eval()


@torch.no_grad()
def test_every_layer_reads_its_shares_of_stream_and_embedding():
    model = build(SCALED)
    for index, block in enumerate(model.layers.values()):
        block.residual.weight.copy_(torch.tensor([1.0 - 0.2 * index, 0.3 + index]))
    tokens = torch.arange(24).view(2, 12)
    rotation, mask = model.context(None, 12)
    plain = build(PLAIN)
    x = start = model.embed_tokens(tokens)
    for index, block in enumerate(plain.layers.values()):
        x = block((1.0 - 0.2 * index) * x + (0.3 + index) * start, rotation, mask)
    torch.testing.assert_close(model(tokens), model.lm_head(model.norm(x)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shares_of_one_and_zero_are_the_plain_model_and_mtp_modules_have_none():
    model = build(SCALED)
    for block in model.layers.values():
        block.residual.weight.copy_(torch.tensor([1.0, 0.0]))
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens), build(PLAIN)(tokens))
    assert all(module.block.residual is None for module in model.mtp) and len(model.mtp) == 1


def test_shares_of_the_embedding_start_lower_in_deeper_layers():
    model = build(SCALED)
    shares = torch.stack([block.residual.weight for block in model.layers.values()])
    torch.testing.assert_close(shares, torch.tensor([[1.15, 0.2], [1.1, 0.125], [1.05, 0.05]]))
    assert sum(p.numel() for p in model.parameters()) == SCALED.num_params() == PLAIN.num_params() + 6


def test_no_published_class_has_them():
    assert published_family(SCALED) is None and published_family(PLAIN) is not None
    assert unpublished_reason(SCALED) == "no transformers class has residual_scales"
    with pytest.raises(ValueError, match="llama.cpp's deepseek2 has no residual_scales=True"):
        check_gguf(SCALED)
