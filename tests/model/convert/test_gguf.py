"""The GGUF file holds every tensor where llama.cpp looks for it, and refuses what llama.cpp would misread."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.gguf import save_gguf
from model.convert.gguf_rules import check_gguf, gguf_gap
from model.convert.gguf_tensors import gguf_tensors
from model.convert.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, pre_tokenizer_name, read_tokenizer
from model.init import init_weights
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=12,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=12,
    qk_rope_head_dim=4,
    v_head_dim=32,
    n_routed_experts=4,
    max_position_embeddings=32,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
)
SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
DEEPSEEK = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[一-龥぀-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"[!-/]?[\p{L}]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    vocab = {"a": 0, "b": 1, "ab": 2, "<bos>": 3, "<eos>": 4}
    added = [("<bos>", 3, True), ("<eos>", 4, True), ("<think>", 5, False)]
    tokenizer = {
        "normalizer": None,
        "pre_tokenizer": SMOLLM,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        "added_tokens": [{"content": c, "id": i, "special": s} for c, i, s in added],
    }
    settings = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>"},
        "chat_template": "{{ x }}",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def build() -> Transformer:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=0)
    return model


def read(path: Path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {t.name: t for t in reader.tensors}, {k: f.contents() for k, f in reader.fields.items()}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_read_back_within_the_rounding_of_their_type(kind, tmp_path, tokenizer_folder):
    from gguf import quants

    model = build()
    path = tmp_path / "model.gguf"
    save_gguf(path, CONFIG, model.state_dict(), kind=kind, tokenizer_folder=tokenizer_folder, name="t", licence="mit")
    stored, _ = read(path)
    expected = gguf_tensors(CONFIG, model.state_dict())
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        found = stored[name]
        assert list(reversed(found.shape.tolist())) == list(tensor.shape), name
        values = (
            torch.from_numpy(np.array(quants.dequantize(found.data, found.tensor_type))).reshape(tensor.shape).float()
        )
        kept = found.tensor_type.name
        assert kept == ("F32" if tensor.dim() == 1 or "gate_inp" in name else kept)
        step = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254}[kept]
        assert (values - tensor).abs().max() <= step * tensor.abs().max() * 1.01 + 1e-8, name
    kinds = {t.tensor_type.name for t in stored.values()}
    # attn_k_b has rows of qk_nope_head_dim=12 features, which Q8_0's blocks of 32 cannot hold.
    assert kinds == {
        "f32": {"F32"}, "f16": {"F32", "F16"}, "bf16": {"F32", "BF16"}, "q8_0": {"F32", "F16", "Q8_0"},
    }[kind]  # fmt: skip
    assert (
        stored["blk.0.attn_k_b.weight"].tensor_type.name
        == {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "F16"}[kind]
    )


def test_metadata_says_what_llama_cpp_cannot_guess(tmp_path, tokenizer_folder):
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=8))
    path = tmp_path / "model.gguf"
    save_gguf(
        path, config, build().state_dict(), kind="f32", tokenizer_folder=tokenizer_folder, name="t", licence="mit"
    )
    _, fields = read(path)
    expected = {
        "general.architecture": "deepseek2",
        "general.license": "mit",
        "deepseek2.block_count": 3,
        "deepseek2.nextn_predict_layers": 1,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 36,
        "deepseek2.attention.value_length": 32,
        "deepseek2.attention.key_length_mla": 16,
        "deepseek2.attention.value_length_mla": 32,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_group_count": 2,
        "deepseek2.expert_group_used_count": 1,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.rope.scaling.type": "yarn",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ x }}",
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["deepseek2.expert_weights_scale"] == pytest.approx(2.5)
    assert fields["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_one_mtp_module_is_the_block_behind_the_last_and_deeper_ones_are_told(tmp_path, tokenizer_folder):
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=2)
    model = Transformer(config)
    init_weights(model, config, seed=0)
    path = tmp_path / "model.gguf"
    report = save_gguf(
        path, config, model.state_dict(), kind="f32", tokenizer_folder=tokenizer_folder, name="t", licence="mit"
    )
    stored, _ = read(path)
    mtp = {name.removeprefix("blk.2.") for name in stored if name.startswith("blk.2.")}
    assert {"nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight", "attn_k_b.weight"} < mtp
    assert not any(name.startswith("blk.3.") for name in stored)
    assert report.notes() == ["1 of 2 MTP modules are left out: llama.cpp has no place"]


def test_further_end_tokens_have_two_places(tmp_path, tokenizer_folder):
    path = tmp_path / "model.gguf"
    report = save_gguf(
        path, CONFIG, build().state_dict(), kind="f32", tokenizer_folder=tokenizer_folder, name="t", licence="mit",
        end_ids=[4, 3, 5, 0],
    )  # fmt: skip
    _, fields = read(path)
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ids == [4, 3, 5]
    assert report.notes() == ["end tokens 0 are left out: a GGUF file has three places for them"]


def test_token_types_and_padding(tokenizer_folder):
    tokenizer = read_tokenizer(tokenizer_folder, 8)
    assert tokenizer.tokens == ["a", "b", "ab", "<bos>", "<eos>", "<think>", "[PAD6]", "[PAD7]"]
    assert tokenizer.types == [NORMAL] * 3 + [CONTROL] * 2 + [USER_DEFINED] + [UNUSED] * 2
    assert (tokenizer.merges, tokenizer.special, tokenizer.add_bos) == (["a b"], {"bos": 3, "eos": 4}, False)


def test_pre_tokenizers_that_llama_cpp_has_are_recognised():
    assert pre_tokenizer_name({"pre_tokenizer": SMOLLM, "normalizer": None}) == "smollm"
    assert (
        pre_tokenizer_name({"pre_tokenizer": DEEPSEEK, "normalizer": {"type": "Sequence", "normalizers": []}})
        == "deepseek-v3"
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}},
        {"pre_tokenizer": SMOLLM, "normalizer": {"type": "NFKC"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": False}, SMOLLM["pretokenizers"][1]],
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [SMOLLM["pretokenizers"][0], {"type": "ByteLevel", "add_prefix_space": True}],
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}] * 3 + [DEEPSEEK["pretokenizers"][3]],
            }
        },
    ],
)
def test_any_other_splitting_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"llama\.cpp has no equal known here.*export\.gguf=\[\]"):
        pre_tokenizer_name(tokenizer)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_folder):
    with pytest.raises(ValueError, match="token ids up to 5: the model's vocabulary has 5"):
        read_tokenizer(tokenizer_folder, 5)


def test_a_tokenizer_that_is_no_bpe_is_refused(tokenizer_folder):
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Unigram"
    (tokenizer_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="of type 'Unigram'"):
        read_tokenizer(tokenizer_folder, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": RopeScaling(4.0, 8, mscale=0.5)}, "mscale=0.5 differs from mscale_all_dim=1.0"),
        ({"q_lora_rank": None}, "q_lora_rank=None with num_hidden_layers=2: llama.cpp takes models of 26 or 27 layers"),
        ({"num_hidden_layers": 27}, "q_lora_rank=32 with num_hidden_layers=27"),
    ],
)
def test_models_llama_cpp_would_misread_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_gguf(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"attention": "gqa"}, "attention=gqa"),
        ({"position": "cope"}, "position=cope"),
        ({"norm": "dyt"}, "norm=dyt"),
        ({"recursion_depth": 2}, "recursion_depth=2"),
        ({"residual_scales": True}, "residual_scales=True"),
        ({"value_embeddings": True}, "value_embeddings=True"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax with topk_method=noaux_tc"),
        ({"scoring_func": "softmax", "topk_method": "group_limited_greedy"}, "topk_method=group_limited_greedy"),
    ],
)
def test_architectures_deepseek2_has_no_place_for_are_named(change, gap):
    config = dataclasses.replace(CONFIG, **change)
    assert gguf_gap(config) == f"llama.cpp's deepseek2 has no {gap}"
    with pytest.raises(ValueError, match=r"Set export\.gguf=\[\]"):
        check_gguf(config)
    assert gguf_gap(CONFIG) is None


def test_sparse_attention_whose_scores_are_often_equal_has_no_gguf():
    few = dataclasses.replace(CONFIG, attention="dsa", index_topk=8, index_head_dim=64)
    assert "reads other tokens than training did where index scores are equal" in str(gguf_gap(few))
    for change in ({"index_n_heads": 16}, {"index_topk": CONFIG.max_position_embeddings}):
        assert gguf_gap(dataclasses.replace(few, **change)) is None


@pytest.mark.parametrize("dim", [16, 32, 96, 192])
def test_index_heads_that_would_abort_llama_cpp_have_no_gguf(dim):
    config = dataclasses.replace(CONFIG, attention="dsa", index_n_heads=16, index_topk=8, index_head_dim=dim)
    assert f"this model has index_head_dim={dim}" in str(gguf_gap(config))
    assert gguf_gap(dataclasses.replace(config, index_head_dim=128)) is None


def test_deepseek_v2_lites_layer_count_may_have_direct_queries():
    check_gguf(dataclasses.replace(CONFIG, q_lora_rank=None, num_hidden_layers=27))
