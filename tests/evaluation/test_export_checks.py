"""The export checks pass a faithful export and name what is wrong with any other."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.gguf import save_gguf
from model.convert.hf import save_hf
from model.convert.native import save_native
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.evaluation.export_checks import GGUF_TOLERANCES, check_gguf, check_hf, check_native
from ray_pipeline.records.artifacts import atomic_folder, write_manifest
from tests.evaluation.made_models import EXPORTABLE

QUESTIONS = ["What is 12 + 34?", "Solve x + 5 = 9.", "Which is larger, 7 or 11?"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_trained(train_bpe(["What is the larger of 12 and 34? Solve this and that."] * 20, 320), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> ChatTokenizer:
    return load_tokenizer(tokenizer_folder)


def build(config: ModelConfig = EXPORTABLE) -> Transformer:
    model = Transformer(config)
    init_weights(model, config, seed=4)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
        # Byte tokens are pieces of characters, about which llama.cpp says nothing: make whole ASCII likelier.
        model.lm_head.weight[:7] *= 0.1
        model.lm_head.weight[101:] *= 0.1
    return model.eval()


@pytest.fixture
def hf_folder(tmp_path, tokenizer_folder) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_hf(folder, EXPORTABLE, build().state_dict(), tokenizer_folder=tokenizer_folder, model_card="# t\n")
    return folder


def test_a_faithful_hf_folder_passes(hf_folder, tokenizer):
    check = check_hf(hf_folder, build(), tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("passed", "")
    assert check.figures["max_logit_difference"] < 1e-4
    assert check.figures["greedy_answers_compared"] == len(QUESTIONS)


def test_plain_text_that_does_not_begin_as_in_training_fails(hf_folder, native_folder, tokenizer):
    check = check_hf(hf_folder, build(), tokenizer, QUESTIONS, begins=True)
    assert check.status == "failed" and "tokenizer: ids of" in check.detail
    check = check_native(native_folder, build(NATIVE), tokenizer, QUESTIONS, begins=True)
    assert (check.status, check.detail) == ("failed", "the tokenizer gives other ids")


def test_a_changed_weight_fails_with_the_figure(hf_folder, tokenizer):
    model = build()
    with torch.no_grad():
        model.layers["1"].mlp.experts.down_proj.mul_(1.5)
    check = check_hf(hf_folder, model, tokenizer, QUESTIONS)
    assert check.status == "failed"
    assert f"largest logit difference {check.figures['max_logit_difference']:.3g} is over 0.001" in check.detail


NATIVE = dataclasses.replace(EXPORTABLE, attention="gqa", num_key_value_heads=1, norm="dyt")


@pytest.fixture
def native_folder(tmp_path, tokenizer_folder) -> Path:
    with atomic_folder(tmp_path / "native") as folder:
        model = build(NATIVE)
        save_native(folder, NATIVE, model.state_dict(), tokenizer_folder=tokenizer_folder, model_card="# t\n")
    return tmp_path / "native"


def test_a_faithful_folder_of_our_own_format_passes(native_folder, tokenizer):
    check = check_native(native_folder, build(NATIVE), tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("passed", "")
    assert check.figures == {"max_logit_difference": 0.0, "greedy_answers_compared": len(QUESTIONS)}


def test_what_is_wrong_with_a_folder_of_our_own_format_is_named(native_folder, tokenizer):
    model = build(NATIVE)
    with torch.no_grad():
        model.layers["1"].input_layernorm.alpha.add_(0.1)
    check = check_native(native_folder, model, tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("failed", "layers.1.input_layernorm.alpha differs")
    check = check_native(native_folder, build(dataclasses.replace(NATIVE, rope_theta=5e3)), tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("failed", "config.json is of another architecture")
    path = native_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    check = check_native(native_folder, build(NATIVE), tokenizer, QUESTIONS)
    assert check.status == "failed" and "it does not load" in check.detail


def test_another_tokenizer_in_a_folder_of_our_own_format_fails(native_folder, tokenizer, tmp_path):
    save_trained(train_bpe(["zebra quagga okapi"] * 20, 300), tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").replace(native_folder / "tokenizer.json")
    write_manifest(native_folder)
    check = check_native(native_folder, build(NATIVE), tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("failed", "the tokenizer gives other ids")


def test_a_changed_chat_template_fails(hf_folder, tokenizer):
    path = hf_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = settings["chat_template"].replace("<｜User｜>", "User: ")
    path.write_text(json.dumps(settings))
    check = check_hf(hf_folder, build(), tokenizer, QUESTIONS)
    assert check.status == "failed"
    assert "prompt ids of 'What is 12 + 34?' differ" in check.detail


YARN = dataclasses.replace(
    EXPORTABLE,
    rope_scaling=RopeScaling(4.0, 32),
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    n_shared_experts=2,
)

V2 = dataclasses.replace(
    EXPORTABLE, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_shared_experts=2,
    routed_scaling_factor=2.0,
)  # fmt: skip


@pytest.mark.parametrize("config", [EXPORTABLE, YARN, V2], ids=["plain", "yarn_groups", "v2_router"])
def test_llama_cpp_agrees_with_every_gguf(config, tmp_path, tokenizer_folder, tokenizer):
    pytest.importorskip("xllamacpp")
    for kind in GGUF_TOLERANCES:
        path = tmp_path / f"model-{kind}.gguf"
        save_gguf(
            path,
            config,
            build(config).state_dict(),
            kind=kind,
            tokenizer_folder=tokenizer_folder,
            name="t",
            licence="mit",
        )
        check = check_gguf(path, kind, build(config), tokenizer, QUESTIONS)
        assert (check.status, check.detail) == ("passed", ""), check
        assert check.figures["positions"] >= 24, check
        if kind == "f32":
            assert check.figures["max_logprob_difference"] < 1e-4


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_of_another_model_fails(kind, tmp_path, tokenizer_folder, tokenizer):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "model.gguf"
    wrong = dataclasses.replace(EXPORTABLE, routed_scaling_factor=3.0)
    save_gguf(path, wrong, build().state_dict(), kind=kind, tokenizer_folder=tokenizer_folder, name="t", licence="mit")
    check = check_gguf(path, kind, build(), tokenizer, QUESTIONS)
    assert check.status == "failed"
    assert "likeliest token agrees at" in check.detail


def test_a_broken_gguf_fails(tmp_path, tokenizer):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF nonsense")
    check = check_gguf(path, "f32", build(), tokenizer, QUESTIONS)
    assert check.status == "failed" and "llama.cpp does not load it" in check.detail


def test_without_llama_cpp_the_check_is_reported_as_not_run(tmp_path, tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xllamacpp":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check = check_gguf(tmp_path / "model.gguf", "f32", build(), tokenizer, QUESTIONS)
    assert (check.status, check.detail) == ("not run", "install ray-pipeline[llama]")
