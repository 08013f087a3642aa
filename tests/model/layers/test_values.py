"""Value embeddings: the formula, which layers have them, where they start, decoding by every kind, what exports say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.convert.gguf_rules import check_gguf
from model.convert.hf_config import published_family, unpublished_reason
from model.generate.decoder import Decoder
from model.generate.extend import extend
from model.init import initial_weight
from model.parallel.mesh import Mesh, MeshSizes
from model.transformer import Transformer
from ray_pipeline.engine.optimizer import build_optimizer, table_of
from ray_pipeline.settings.schema import OptimizerConfig
from tests.attention_kinds import KINDS, randomise


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    randomise(model)
    return model


def with_values(name: str) -> ModelConfig:
    return replace(KINDS[name], value_embeddings=True)


def tokens_of(config: ModelConfig, rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_attention_reads_its_own_values_and_gated_vectors_of_the_tokens():
    """Queries of zero: attention is then the mean of all values so far."""
    config = replace(with_values("mha"), num_hidden_layers=1, num_nextn_predict_layers=0)
    block = next(iter(build(config).layers.values()))
    nn.init.zeros_(block.self_attn.q_proj.weight)
    tokens, y = tokens_of(config), torch.randn(2, 20, config.hidden_size)
    rotation = torch.ones(1, 20, config.head_dim // 2, dtype=torch.complex64)
    got = block.self_attn(y, rotation, None, values=block.values(y, tokens))
    table, gate = block.value_embedding.table, block.value_embedding.gate
    values = block.self_attn.v_proj(y).unflatten(2, (-1, config.head_dim))
    for row in range(2):
        for place, token in enumerate(tokens[row].tolist()):
            for head in range(config.num_attention_heads):
                share = 3 / (1 + torch.exp(-(gate[head] @ y[row, place, :12])))
                features = slice(head * config.head_dim, (head + 1) * config.head_dim)
                values[row, place, head] += share * table[token, features]
    mean = values.cumsum(1) / torch.arange(1, 21)[:, None, None]
    torch.testing.assert_close(got, block.self_attn.o_proj(mean.flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "those"), [(1, [0]), (4, [1, 3]), (5, [0, 2, 4])])
def test_every_second_layer_has_one_the_last_among_them_and_mtp_modules_have_none(layers: int, those: list[int]):
    model = Transformer(replace(with_values("mla"), num_hidden_layers=layers))
    found = [i for i, block in enumerate(model.layers.values()) if block.value_embedding is not None]
    assert found == those and all(module.block.value_embedding is None for module in model.mtp)


@pytest.mark.parametrize("name", KINDS)
def test_the_analytic_count_is_the_built_models(name: str):
    config = with_values(name)
    assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_params()


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_decoding_equals_the_forward_of_whole_rows(name: str):
    """Prompts of two lengths, token by token, then several tokens in one pass."""
    config = with_values(name)
    model = build(config)
    row = tokens_of(config, rows=1)
    whole, decoder = model(row)[0], Decoder(model)
    logits, cache = decoder.prefill([row[0, :9].tolist(), row[0, :5].tolist()], 20)
    torch.testing.assert_close(logits, whole[[8, 4]], rtol=1e-4, atol=1e-4)
    for place in range(9, 14):
        logits = decoder.step(row[0, [place, place - 4]], cache)
        torch.testing.assert_close(logits, whole[[place, place - 4]], rtol=1e-4, atol=1e-4)
    logits, _ = extend(decoder, torch.stack([row[0, 14:17], row[0, 10:13]]), cache)
    torch.testing.assert_close(logits, torch.stack([whole[14:17], whole[10:13]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mla", "mqa"])
def test_tables_start_small_and_gates_half_open(name: str):
    config = replace(with_values(name), initialisation="fan_in")
    shapes = {n: p.shape for n, p in Transformer(config).named_parameters() if "value_embedding" in n}
    assert len(shapes) == 4
    for parameter, shape in shapes.items():
        drawn = initial_weight(parameter, shape, config, seed=1)
        deviation = 0.0 if "gate" in parameter else config.hidden_size**-0.5
        assert drawn.std().item() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("name", ["mla", "mqa"])
def test_muon_leaves_the_tables_to_adamw_at_the_embeddings_rate(name: str):
    config = OptimizerConfig(name="muon", lr=0.01, embedding_lr_factor=15, weight_decay=0.3)
    named = dict(Transformer(with_values(name)).named_parameters())
    tables = [p for n, p in named.items() if ".value_embedding.table" in n]
    assert len(tables) == 2 and all(table_of(n, config) == "embedding" for n in named if ".value_embedding.table" in n)
    groups = {group["name"]: group for group in build_optimizer(named, config, Mesh(MeshSizes())).param_groups}
    members = {id(p) for p in groups["embedding"]["params"]}
    assert members == {id(p) for p in [*tables, named["embed_tokens.weight"]]}
    assert any(".value_embedding.gate" in n for n in groups["muon"]["names"])


def test_a_stream_narrower_than_the_gate_reads_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size=8 with value_embeddings: their gate reads 12 features"):
        replace(with_values("mha"), hidden_size=8).validate()


def test_no_published_class_has_them():
    config = ModelConfig(value_embeddings=True)
    assert published_family(config) is None
    assert unpublished_reason(config) == "no transformers class has value_embeddings"
    with pytest.raises(ValueError, match="llama.cpp's deepseek2 has no value_embeddings=True"):
        check_gguf(config)
