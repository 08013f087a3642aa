"""The export checks pass a faithful export and name what is wrong with any other."""

from __future__ import annotations

import builtins
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.convert.export_kinds import KINDS, ExportKind
from model.convert.gguf import save_gguf
from model.convert.hf import save_hf
from model.convert.native import save_native
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.data.chat.tokenizer import ChatTokenizer, load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.evaluation.export_checks import Export, check_export, native
from ray_pipeline.evaluation.proof import Check, Material
from ray_pipeline.evaluation.proof_programs import OurProgram
from ray_pipeline.evaluation.rounding_cost import HeldOut, RoundingCost
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


def check(
    path: Path, kind: ExportKind, model: Transformer, tokenizer: ChatTokenizer, *, begins: bool = False,
    questions: Sequence[str] = QUESTIONS, cost: RoundingCost | None = None,
) -> list[Check]:  # fmt: skip
    return check_export(Export(path.name, path, kind, model, Material(tokenizer, questions, begins), cost))


FLOAT32, NATIVE = KINDS["float32"], native("float32")


@pytest.fixture
def hf_folder(tmp_path, tokenizer_folder) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_hf(folder, EXPORTABLE, build().state_dict(), tokenizer_folder=tokenizer_folder, model_card="# t\n")
    return folder


def test_a_faithful_hf_folder_passes_in_transformers_and_in_our_own_loader(hf_folder, tokenizer):
    checks = check(hf_folder, FLOAT32, build(), tokenizer)
    assert [(c.status, c.detail, c.program.split()[0]) for c in checks] == [
        ("passed", "", "transformers"), ("passed", "", "ray-pipeline")
    ]  # fmt: skip
    for found in checks:
        assert found.figures["max_logprob_difference"] < 1e-4
        assert (found.figures["greedy_answers_compared"], found.figures["largest_weight_error"]) == (len(QUESTIONS), 0)


def test_plain_text_that_does_not_begin_as_in_training_fails(hf_folder, native_folder, tokenizer):
    for found in check(hf_folder, FLOAT32, build(), tokenizer, begins=True):
        assert found.status == "failed" and found.detail.startswith("ids of 'The answer is 1234567890.' differ")
    [found] = check(native_folder, NATIVE, build(OTHER), tokenizer, begins=True)
    assert found.status == "failed" and found.detail.startswith("ids of")


def test_a_changed_weight_fails_with_the_figure(hf_folder, tokenizer):
    model = build()
    with torch.no_grad():
        model.layers["1"].mlp.experts.down_proj.mul_(1.5)
    [found] = check(hf_folder, FLOAT32, model, tokenizer)
    assert (found.status, found.detail) == ("failed", "a matrix is 33.33% off, over the 0.00% of float32")


def test_a_config_that_misleads_a_program_fails(hf_folder, tokenizer):
    values = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(values | {"routed_scaling_factor": 3.0}))
    for found in check(hf_folder, FLOAT32, build(), tokenizer):
        assert found.status == "failed" and "mean log-probability difference" in found.detail


def test_an_end_token_that_is_not_stated_fails(hf_folder, tokenizer):
    (hf_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    (transformers, _) = check(hf_folder, FLOAT32, build(), tokenizer)
    assert f"end tokens [{tokenizer.eos_id}] do not end an answer there" in transformers.detail


OTHER = dataclasses.replace(EXPORTABLE, attention="gqa", num_key_value_heads=1, norm="dyt")


@pytest.fixture
def native_folder(tmp_path, tokenizer_folder) -> Path:
    with atomic_folder(tmp_path / "native") as folder:
        model = build(OTHER)
        save_native(folder, OTHER, model.state_dict(), tokenizer_folder=tokenizer_folder, model_card="# t\n")
    return tmp_path / "native"


def test_a_faithful_folder_of_our_own_format_passes(native_folder, tokenizer):
    [found] = check(native_folder, NATIVE, build(OTHER), tokenizer)
    assert (found.status, found.detail) == ("passed", "")
    assert found.figures["max_logprob_difference"] == found.figures["largest_weight_error"] == 0


def test_what_is_wrong_with_a_folder_of_our_own_format_is_named(native_folder, tokenizer):
    [found] = check(native_folder, NATIVE, build(dataclasses.replace(OTHER, rope_theta=5e3)), tokenizer)
    assert found.status == "failed" and found.detail.endswith("config.json is of another architecture")
    path = native_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    [found] = check(native_folder, NATIVE, build(OTHER), tokenizer)
    assert found.status == "failed" and "it cannot be read back" in found.detail


def test_another_tokenizer_in_a_folder_of_our_own_format_fails(native_folder, tokenizer, tmp_path):
    save_trained(train_bpe(["zebra quagga okapi"] * 20, 300), tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").replace(native_folder / "tokenizer.json")
    write_manifest(native_folder)
    [found] = check(native_folder, NATIVE, build(OTHER), tokenizer)
    assert found.status == "failed" and "ids of" in found.detail


def test_a_changed_chat_template_fails(hf_folder, tokenizer):
    path = hf_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = settings["chat_template"].replace("<｜User｜>", "User: ")
    path.write_text(json.dumps(settings))
    for found in check(hf_folder, FLOAT32, build(), tokenizer):
        assert found.status == "failed"
        assert "prompt ids of 'What is 12 + 34?' (1 messages) differ" in found.detail


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
DSA = dataclasses.replace(EXPORTABLE, attention="dsa", index_topk=8, index_head_dim=64, index_n_heads=16)


def save(path: Path, config: ModelConfig, model: Transformer, tokenizer_folder: Path, kind: str) -> None:
    save_gguf(path, config, model.state_dict(), kind=kind, tokenizer_folder=tokenizer_folder, name="t", licence="mit")


@pytest.mark.parametrize("config", [EXPORTABLE, YARN, V2, DSA], ids=["plain", "yarn_groups", "v2_router", "v32"])
def test_llama_cpp_agrees_with_every_gguf(config, tmp_path, tokenizer_folder, tokenizer):
    pytest.importorskip("xllamacpp")
    # Coarser products make the indexer choose other tokens, of which a model of 8 read ones cannot spare any.
    for kind in ("f32", "f16") if config is DSA else ("f32", "f16", "bf16", "q8_0", "q4_k_m"):
        path = tmp_path / f"model-{kind}.gguf"
        save(path, config, build(config), tokenizer_folder, kind)
        [found] = check(path, KINDS[kind], build(config), tokenizer)
        assert (found.status, found.detail) == ("passed", ""), found
        assert found.figures["positions"] >= 24, found
        if kind == "f32":
            assert found.figures["max_logprob_difference"] < 1e-4


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_of_another_model_fails(kind, tmp_path, tokenizer_folder, tokenizer):
    pytest.importorskip("xllamacpp")
    path = tmp_path / "model.gguf"
    save(path, dataclasses.replace(EXPORTABLE, routed_scaling_factor=3.0), build(), tokenizer_folder, kind)
    [found] = check(path, KINDS[kind], build(), tokenizer)
    assert found.status == "failed"
    assert "likeliest token agrees at" in found.detail


def test_a_wrongly_permuted_matrix_is_no_rounding(tmp_path, tokenizer_folder, tokenizer):
    path, wrong = tmp_path / "model.gguf", build()
    heads = wrong.layers["1"].self_attn.kv_b_proj.weight
    with torch.no_grad():
        heads.copy_(heads.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
    save(path, EXPORTABLE, wrong, tokenizer_folder, "q2_k")
    [found] = check(path, KINDS["q2_k"], build(), tokenizer)
    assert found.status == "failed" and "off, over the 60.00% of q2_k" in found.detail


def test_what_rounding_costs_is_measured_beside_the_full_weights(tmp_path, tokenizer_folder, tokenizer):
    pytest.importorskip("xllamacpp")
    path, model = tmp_path / "model.gguf", build()
    save(path, EXPORTABLE, model, tokenizer_folder, "q2_k")
    documents = [tokenizer.encode("What is the larger of 12 and 34?"), tokenizer.encode("naïve café 漢字")]
    asked = [{"prompt": question, "answer": "1"} for question in QUESTIONS]
    full = OurProgram(model, tokenizer, frozenset({tokenizer.eos_id}), [])
    cost = RoundingCost(HeldOut(tokenizer, documents, asked, 8, context=128), full)
    [found] = check(path, KINDS["q2_k"], model, tokenizer, cost=cost)
    figures = found.figures
    assert (figures["tokens"], figures["questions"]) == (sum(len(d) - 1 for d in documents), len(QUESTIONS))
    rows = [model(torch.tensor([d]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(d[1:])[:, None]) for d in documents]
    assert figures["perplexity_before"] == pytest.approx(float(torch.cat(rows).mean().neg().exp()), rel=1e-5)
    assert figures["perplexity"] != pytest.approx(figures["perplexity_before"], rel=1e-3)
    assert figures["perplexity"] == pytest.approx(figures["perplexity_before"], rel=0.5)


def test_a_broken_gguf_fails(tmp_path, tokenizer):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF nonsense")
    [found] = check(path, KINDS["f32"], build(), tokenizer)
    assert found.status == "failed" and "it cannot be read back" in found.detail


def test_without_llama_cpp_the_check_is_reported_as_not_run(tmp_path, tokenizer, tokenizer_folder, monkeypatch):
    path = tmp_path / "model.gguf"
    save(path, EXPORTABLE, build(), tokenizer_folder, "f32")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xllamacpp":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    [found] = check(path, KINDS["f32"], build(), tokenizer)
    assert (found.status, found.detail) == ("not run", "install ray-pipeline[llama]")


def test_tools_and_calls_are_rendered_as_ours(tmp_path):
    pytest.importorskip("xllamacpp")
    save_trained(train_bpe(["What is 12 + 34?"] * 20, 320, tools=True), tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(Material(tokenizer, QUESTIONS).chats()) == len(QUESTIONS) + 4
    model = build()
    (tmp_path / "hf").mkdir()
    save_hf(tmp_path / "hf", EXPORTABLE, model.state_dict(), tokenizer_folder=tmp_path / "tokenizer", model_card="")
    save(tmp_path / "m.gguf", EXPORTABLE, model, tmp_path / "tokenizer", "f32")
    checks = check(tmp_path / "hf", FLOAT32, model, tokenizer) + check(
        tmp_path / "m.gguf", KINDS["f32"], model, tokenizer
    )
    assert [(found.status, found.detail) for found in checks] == [("passed", "")] * 3
