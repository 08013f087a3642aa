"""V2, V3 and V3.2 as transformers saves them: read, trained, written, and read by transformers again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.hf import save_hf
from model.convert.hf_config import FAMILIES, config_from_hf, published_family, to_hf, unpublished_reason
from model.convert.hf_load import load_hf
from model.transformer import Transformer

# Weights of 0.15: logits of both models lie within 7e-6 of float64's. With 0.25 fp32 itself is 1.7e-5 off, in both.
SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.15,
    num_nextn_predict_layers=0,
)  # fmt: skip
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.7)
V2 = dataclasses.replace(SMALL, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2)
MODELS = {
    "v2_lite": dataclasses.replace(V2, q_lora_rank=None, rope_scaling=YARN),
    "v2_groups": dataclasses.replace(
        V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "v3": dataclasses.replace(SMALL, rope_scaling=YARN, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    # Many index heads: with few, several tokens score exactly zero (ReLU) and which of them is taken means nothing.
    "v32": dataclasses.replace(SMALL, attention="dsa", index_n_heads=24, index_head_dim=8, index_topk=6),
}
TOKENS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def transformers_model(config: ModelConfig):
    """Random weights of the published class, balancing biases away from zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_hf(config)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).float().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(8) * 0.3)
    return theirs


def tokenizer(folder: Path) -> Path:
    folder.mkdir()
    added = [{"id": 60 + i, "content": name} for i, name in enumerate(["<bos>", "<eos>", "<pad>"])]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def train(model: Transformer, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        logits = model(TOKENS)
        total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saved_is_read_trained_written_and_read_by_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM

    config, theirs = MODELS[name], transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    read, state = load_hf(tmp_path / "theirs")
    assert read == config
    model = Transformer(read)
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        before = theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-5)
    train(model)
    (tmp_path / "ours").mkdir()
    folder = tokenizer(tmp_path / "tokenizer")
    save_hf(tmp_path / "ours", read, model.state_dict(), tokenizer_folder=folder, model_card="# card\n")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(theirs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        after = model(TOKENS)
        assert (after - before).abs().max() > 0.01
        torch.testing.assert_close(again.eval()(TOKENS).logits, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_transformers_takes_for_them(model_type):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type)
    ours = FAMILIES[model_type].defaults
    assert {key: getattr(theirs, key) for key in ours} == dict(ours)


def test_deepseek_v2_lites_own_config_is_read():
    published = {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001, "bos_token_id":
        100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    }  # fmt: skip
    config = config_from_hf(published)
    assert (config.scoring_func, config.topk_method, config.aux_loss_alpha) == ("softmax", "greedy", 0.001)
    assert config.num_nextn_predict_layers == 0
    assert config.num_params() == pytest.approx(15.7e9, rel=1e-2)
    assert config.num_params(active=True) == pytest.approx(2.7e9, rel=5e-2)


def test_deepseek_v32s_own_config_is_read():
    from transformers import DeepseekV32Config

    config = config_from_hf(DeepseekV32Config().to_dict())
    assert (config.attention, config.index_n_heads, config.index_head_dim, config.index_topk) == ("dsa", 64, 128, 2048)
    assert config.num_params(mtp=False) == pytest.approx(671.9e9, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_config_survives_the_round_trip(name):
    assert config_from_hf(to_hf(MODELS[name])) == MODELS[name]
    assert config_from_hf(json.loads(json.dumps(to_hf(MODELS[name])))) == MODELS[name]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v2_lite", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
        ("v2_lite", {"topk_method": "noaux_tc"}, "'noaux_tc' is not supported, only 'greedy' or 'group_lim"),
        ("v2_lite", {"num_experts_per_tok": None}, "num_experts_per_tok is not given, and DeepSeek-V2 has no default"),
        ("v3", {"hidden_size": "32"}, "hidden_size='32': must be a whole number"),
        ("v3", {"n_routed_experts": True}, "n_routed_experts=True: must be a whole number"),
        ("v3", {"norm_topk_prob": 1}, "norm_topk_prob=1: must be true or false"),
        ("v3", {"routed_scaling_factor": "2"}, "routed_scaling_factor='2': must be a number"),
        ("v3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor=1.5"),
        ("v3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "needs original_max_position_embeddings"),
        ("v32", {"q_lora_rank": None}, "q_lora_rank=None with attention=dsa"),
        ("v32", {"mlp_layer_types": ["sparse"] * 3}, "contradicts first_k_dense_replace=1"),
        ("v32", {"layer_types": ["full_attention"] * 3}, "'full_attention'"),
    ],
)  # fmt: skip
def test_a_config_that_would_be_wrong_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(to_hf(MODELS[name]) | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention": "gqa"}, "no transformers class has attention=gqa"),
        ({"position": "cope"}, "no transformers class has position=cope"),
        ({"norm": "dyt"}, "no transformers class has norm=dyt"),
        ({"recursion_depth": 3}, "no transformers class has recursion_depth=3"),
        ({"residual_scales": True}, "no transformers class has residual_scales"),
        ({"value_embeddings": True}, "no transformers class has value_embeddings"),
        ({"topk_method": "greedy"}, "no transformers class has scoring_func=sigmoid with topk_method=greedy"),
        ({"scoring_func": "softmax"}, "no transformers class has scoring_func=softmax with topk_method=noaux_tc"),
        (
            {"scoring_func": "softmax", "topk_method": "greedy"},
            "transformers' DeepseekV2 has .* only with norm_topk_prob=false",
        ),
        (
            {"attention": "dsa", "scoring_func": "softmax", "topk_method": "greedy"},
            "no transformers class has attention=dsa and scoring_func=softmax",
        ),
        (
            {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "num_attention_heads": 3},
            "refuses hidden_size=32, which is no multiple of num_attention_heads=3",
        ),
    ],
)
def test_an_architecture_without_a_published_class_says_why(change, reason):
    config = dataclasses.replace(SMALL, **change)
    assert published_family(config) is None
    with pytest.raises(ValueError, match=reason + ".*: there is no config.json for it"):
        to_hf(config)
    assert unpublished_reason(SMALL) is None
