"""Counts by kind against the published model and against built ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.parallel.shard_plan import shard_of
from model.transformer import Transformer
from ray_pipeline.costs.weights import by_kind, counts, main_model, part_weights
from ray_pipeline.settings.loading import load_config

V3 = load_config(Path("configs/v3-671b.yaml"), {}).model


def billions(count: int) -> str:
    return f"{count / 1e9:.0f}B"


def test_v3_has_671b_parameters_of_which_37b_are_active() -> None:
    """DeepSeek-V3 (arXiv:2412.19437), abstract; neither figure has the MTP module in it."""
    found = counts(V3)
    assert billions(main_model(found["total"])) == "671B"
    assert billions(main_model(found["active"])) == "37B"
    assert main_model(found["total"]) == 671_026_404_352


def test_v3s_mtp_module_and_embedding_are_as_published() -> None:
    """The weights' README: 11.5B parameters of its own (11.6B with the 0.1B projection), 0.9B embedding and head."""
    found = counts(V3)["total"]
    assert f"{(found['MTP'] - 2 * V3.hidden_size**2) / 1e9:.1f}B" == "11.5B"
    assert f"{found['embedding'] / 1e9:.1f}B" == f"{found['head'] / 1e9:.1f}B" == "0.9B"


MODELS = st.builds(
    ModelConfig,
    vocab_size=st.sampled_from([32, 96]),
    hidden_size=st.sampled_from([16, 32]),
    intermediate_size=st.sampled_from([32, 64]),
    moe_intermediate_size=st.sampled_from([8, 16]),
    num_hidden_layers=st.integers(1, 4),
    first_k_dense_replace=st.integers(0, 3),
    num_attention_heads=st.sampled_from([4, 8]),
    q_lora_rank=st.sampled_from([None, 12]),
    attention=st.sampled_from(["mla", "mha", "gqa", "mqa"]),
    position=st.sampled_from(["rope", "cope"]),
    norm=st.sampled_from(["rmsnorm", "dyt"]),
    residual_scales=st.booleans(),
    value_embeddings=st.booleans(),
    n_routed_experts=st.sampled_from([4, 8]),
    n_shared_experts=st.integers(0, 2),
    num_nextn_predict_layers=st.integers(0, 2),
).map(lambda model: replace(model, num_key_value_heads=4 if model.attention == "gqa" else None))


def built_numbers(model: ModelConfig, layers: range, tp: int, ep: int) -> int:
    """Numbers that one rank holds of a really built part, cut as `model.parallel.shard_plan` cuts it."""
    with torch.device("meta"):
        part = Transformer(model, layers)
    total = 0
    for name, parameter in part.named_parameters():
        shard = shard_of(name)
        total += parameter.numel() // ((tp if shard.tp_dim is not None else 1) * (ep if shard.expert else 1))
    return total


@given(MODELS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.data())
def test_a_ranks_part_has_as_many_numbers_as_the_built_one(model: ModelConfig, tp: int, ep: int, data) -> None:
    start = data.draw(st.integers(0, model.num_hidden_layers - 1))
    layers = range(start, data.draw(st.integers(start + 1, model.num_hidden_layers)))
    counted = sum(weight.local(tp, ep) for weight in part_weights(model, layers))
    assert counted == built_numbers(model, layers, tp, ep)


@given(MODELS.filter(lambda model: model.first_k_dense_replace <= model.num_hidden_layers))
def test_kinds_add_up_to_the_models_own_count(model: ModelConfig) -> None:
    total = by_kind(part_weights(model, range(model.num_hidden_layers)))
    assert sum(total.values()) == model.num_params()
    assert main_model(total) == model.num_params(mtp=False)


def test_every_weight_in_a_dense_model_is_active_but_the_embedding() -> None:
    model = ModelConfig(first_k_dense_replace=99, num_nextn_predict_layers=0)
    found = counts(model)
    assert found["active"] == found["total"] | {"embedding": model.hidden_size}


@pytest.mark.parametrize("kind", ["routed experts", "router", "shared experts"])
def test_a_kind_that_is_not_there_is_not_listed(kind: str) -> None:
    model = ModelConfig(first_k_dense_replace=99, num_nextn_predict_layers=0)
    assert kind not in counts(model)["total"]


@given(MODELS.filter(lambda model: model.q_lora_rank is not None), st.sampled_from([1, 2]), st.integers(1, 6))
def test_the_indexer_is_counted_whole_on_every_rank(model: ModelConfig, tp: int, heads: int) -> None:
    model = replace(model, attention="mla", position="rope")
    sparse = replace(model, attention="dsa", index_n_heads=heads, index_head_dim=12)
    layers = range(sparse.num_hidden_layers)
    counted = sum(weight.local(tp, 1) for weight in part_weights(sparse, layers))
    assert counted == built_numbers(sparse, layers, tp, 1)
    dense = sum(weight.local(tp, 1) for weight in part_weights(model, layers))
    per_layer = 12 * heads * sparse.q_lora_rank + sparse.hidden_size * (12 + heads) + 2 * 12
    assert counted - dense == per_layer * (sparse.num_hidden_layers + sparse.num_nextn_predict_layers)


@given(MODELS, st.sampled_from([1, 2]), st.integers(2, 4))
def test_a_recursion_has_one_scale_a_feature_and_pass(model: ModelConfig, tp: int, depth: int) -> None:
    again, layers = replace(model, recursion_depth=depth), range(model.num_hidden_layers)
    counted = sum(weight.local(tp, 1) for weight in part_weights(again, layers))
    assert counted == built_numbers(again, layers, tp, 1)
    assert counted - sum(weight.local(tp, 1) for weight in part_weights(model, layers)) == depth * model.hidden_size
