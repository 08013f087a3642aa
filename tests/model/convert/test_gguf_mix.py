"""The mixtures of types are llama.cpp's: the file is, byte for byte, what its own quantiser makes of the fp32 one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.convert.export_kinds import KINDS
from model.convert.ggml import quantise
from model.convert.gguf import save_gguf
from model.convert.gguf_mix import Mixture
from model.convert.gguf_read import read_gguf
from model.convert.importance import importance_matrix
from model.init import init_weights
from model.transformer import Transformer
from tests.evaluation.made_models import EXPORTABLE, save_tokenizer

WEIGHTED = [kind.name for kind in KINDS.values() if kind.weighted]
# Rows of whole blocks of 256, but for those of the head's query without position.
WIDE = dataclasses.replace(
    EXPORTABLE, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, kv_lora_rank=256, q_lora_rank=256
)


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, config, seed=3)
    return model.eval()


def save(path: Path, model: Transformer, tokenizer: Path, **options):
    given = {"tokenizer_folder": tokenizer, "name": "t", "licence": "mit"} | options
    return save_gguf(path, model.config, model.state_dict(), **given)


def tensors(path: Path):
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def text(model: Transformer) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)
    real = torch.ones(2, 64, dtype=torch.bool)
    real[1, 32:] = False
    return [(tokens, torch.zeros_like(tokens), real)]


def test_the_most_sensitive_matrices_have_more_bits():
    mixture = Mixture("q4_k_m", layers=16, experts=4)
    names = {
        "output.weight": "Q6_K", "token_embd.weight": "Q4_K", "blk.0.ffn_down_exps.weight": "Q6_K",
        "blk.2.ffn_down_exps.weight": "Q4_K", "blk.4.ffn_down_shexp.weight": "Q6_K", "blk.3.ffn_up_exps.weight": "Q4_K",
        "blk.3.ffn_gate_inp.weight": "F32", "blk.3.attn_output.weight": "Q4_K",
    }  # fmt: skip
    assert {name: mixture.type_of(name, (512, 512)) for name in names} == names
    assert Mixture("q4_k_m", 16, experts=8).type_of("blk.3.attn_output.weight", (512, 512)) == "Q5_K"
    assert not mixture.fallbacks


def test_rows_that_do_not_divide_into_blocks_fall_back_and_are_counted():
    mixture = Mixture("q4_k_m", layers=4, experts=4)
    shapes = {"blk.1.attn_q_a.weight": 96, "blk.1.attn_k_b.weight": 24, "output.weight": 96, "blk.1.ffn_up.weight": 512}
    found = {name: mixture.type_of(name, (64, columns)) for name, columns in shapes.items()}
    assert list(found.values()) == ["Q5_0", "F16", "Q8_0", "Q4_K"]
    assert mixture.fallbacks == {
        "blk.1.attn_q_a.weight": ("Q4_K", "Q5_0"), "blk.1.attn_k_b.weight": ("Q4_K", "F16")
    }  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTED)
def test_every_matrix_is_within_the_rounding_of_its_kind(kind, tmp_path):
    pytest.importorskip("xllamacpp")
    model = build(WIDE)
    report = save(tmp_path / "m.gguf", model, save_tokenizer(tmp_path / "tokenizer"), kind=kind)
    assert report.types[KINDS[kind].stored] > 20
    _, selected = read_gguf(tmp_path / "m.gguf")
    errors = [float((selected.state[n] - t).norm() / t.norm()) for n, t in model.state_dict().items() if t.dim() > 1]
    assert KINDS[kind].rounding / 8 < max(errors) < KINDS[kind].rounding


def test_importance_is_the_mean_square_of_what_each_matrix_reads():
    model = build(EXPORTABLE)
    read: list[torch.Tensor] = []
    model.layers["1"].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    found = importance_matrix(model, text(model))
    real = text(model)[0][2]
    expected = read[0][real].square().mean(0)
    assert torch.allclose(torch.from_numpy(found["blk.1.attn_output.weight"][0]), expected, rtol=1e-5)
    shapes = {name: matrix.shape for name, matrix in found.items()}
    assert shapes["blk.1.ffn_down_exps.weight"] == (4, 32) and shapes["blk.1.attn_k_b.weight"] == (2, 24)
    assert shapes["blk.3.nextn.eh_proj.weight"] == (1, 128)
    assert not {"token_embd.weight", "output.weight"} & shapes.keys()
    assert all(len(module._forward_hooks) == 0 for module in model.modules())


def test_importance_lowers_the_error_where_it_is_high():
    pytest.importorskip("xllamacpp")
    from gguf import GGMLQuantizationType, quants

    random = np.random.default_rng(0)
    values = random.standard_normal((32, 256), np.float32)
    importance = random.random((1, 256), np.float32) ** 4
    errors = {}
    for name, given in (("plain", None), ("weighted", importance)):
        made = quants.dequantize(quantise(values, "Q4_K", given), GGMLQuantizationType.Q4_K)
        errors[name] = float((importance * (made - values) ** 2).sum())
    assert errors["weighted"] < 0.8 * errors["plain"]


def test_matrices_that_the_text_did_not_reach_are_counted(tmp_path):
    pytest.importorskip("xllamacpp")
    model = build(EXPORTABLE)
    found = importance_matrix(model, text(model))
    found["blk.1.ffn_up_exps.weight"][2] = 0
    del found["blk.0.attn_output.weight"]
    report = save(tmp_path / "m.gguf", model, save_tokenizer(tmp_path / "tokenizer"), kind="q4_k_m", importance=found)
    assert report.unweighted == 2
    assert "2 matrices were rounded without importance: the text did not reach them" in report.notes()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "wide", "eight experts"])
@pytest.mark.parametrize("kind", ["bf16", *WEIGHTED])
def test_the_file_is_that_of_llama_cpp_s_own_quantiser(kind, shape, tmp_path):
    """`cyllama`, where it is installed, brings llama.cpp's `llama_model_quantize`."""
    llama = pytest.importorskip("cyllama.llama.llama_cpp")
    from gguf import LlamaFileType

    config = {
        "tiny": EXPORTABLE,
        "wide": dataclasses.replace(WIDE, num_hidden_layers=9),
        "eight experts": dataclasses.replace(EXPORTABLE, n_routed_experts=8, num_hidden_layers=17),
    }[shape]
    model, tokenizer = build(config), save_tokenizer(tmp_path / "tokenizer")
    save(tmp_path / "f32.gguf", model, tokenizer, kind="f32")
    save(tmp_path / "ours.gguf", model, tokenizer, kind=kind)
    params = llama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(LlamaFileType[KINDS[kind].file_type]), 1
    llama.model_quantize(str(tmp_path / "f32.gguf"), str(tmp_path / "theirs.gguf"), params)
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    assert {n: t.tensor_type.name for n, t in ours.items()} == {n: t.tensor_type.name for n, t in theirs.items()}
    for name, tensor in ours.items():
        assert np.array_equal(tensor.data.view(np.uint8), theirs[name].data.view(np.uint8)), name
