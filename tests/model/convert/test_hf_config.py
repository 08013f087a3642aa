"""Published configs are read as they are meant, or refused; the card states what was measured."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from model.config import ModelConfig, RopeScaling
from model.convert.card import model_card
from model.convert.folder import read_config
from model.convert.hf_config import config_from_hf, to_hf

BASE = ModelConfig()


def test_deepseek_v3s_own_config_is_read():
    published = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    config = config_from_hf(published)
    assert config.rope_scaling == RopeScaling(factor=40, original_max_position_embeddings=4096)
    assert config.num_params(mtp=False) == pytest.approx(671e9, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only 'sigmoid'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq' is not supported, only 'fp8'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok=99"),
    ],
)
def test_a_config_that_would_be_wrong_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(to_hf(BASE) | change)


def test_model_card_states_licence_figures_and_baselines():
    card = model_card(
        "tiny",
        BASE,
        licence="apache-2.0",
        data={"builtin": "Apache-2.0"},
        recipe={"steps": "10"},
        figures={"accuracy": 0.5},
        baselines={"chance": 0.25},
    )
    for expected in (
        "license: apache-2.0",
        "| accuracy | 0.5 |",
        "| chance | 0.25 |",
        "| builtin | Apache-2.0 |",
        f"{BASE.num_params():,}",
    ):
        assert expected in card


ODD = [None, True, -1, 0, 1e300, 10**30, "x", "x" * 100_000, [], [1], [[]], {}, {"a": 1}, float("nan"), float("inf")]


@pytest.mark.parametrize("base", [to_hf(BASE), to_hf(replace(BASE, attention="dsa")), asdict(BASE)])
def test_any_odd_value_of_any_key_is_taken_or_refused_in_a_sentence(base):
    refused = 0
    extra = ("rope_parameters", "quantization_config", "layer_types", "mlp_layer_types", "moe_layer_freq", "mlp_bias")
    for key in (*base, *extra):
        for odd in ODD:
            values = base | {key: odd}
            try:
                read_config(values)
            except ValueError as error:
                refused += 1
                assert len(str(error)) < 600
    assert refused > 200


def test_odd_values_in_rope_scaling_are_refused_by_name():
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "mscale"):
        for odd in ("x", [], True, -1e9, float("nan")):
            with pytest.raises(ValueError, match=f"rope_scaling.*{key}"):
                config_from_hf(to_hf(BASE) | {"rope_scaling": yarn | {key: odd}})
