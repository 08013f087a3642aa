"""Weights stored in 8 bits, as DeepSeek-V3 publishes them, are read as the numbers they mean."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.convert.fp8_blocks import dequantise
from model.convert.hf import save_hf
from model.convert.hf_load import load_hf, open_folder
from model.init import init_weights
from model.transformer import Transformer
from tests.evaluation.made_models import EXPORTABLE, save_tokenizer
from tests.model.convert.folders import CONFIG, built, rewrite

BLOCK = (16, 8)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 and scales by the plain definition: each block's largest magnitude becomes 448."""
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
    scales, out = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1])
            scales[i, j] = weight[part].abs().max() / 448
            out[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def make_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite the projections as DeepSeek-V3 publishes them; returns what they then mean."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and "layers" in n]:
        tensors[name], tensors[name + "_scale_inv"] = quantised, scales = to_fp8(tensors[name])
        spread = torch.kron(scales, torch.ones(BLOCK))[: quantised.shape[0], : quantised.shape[1]]
        meant[name] = quantised.float() * spread
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(values))
    return meant


def test_fp8_checkpoints_are_dequantised_block_by_block(folder):
    meant = make_fp8(folder)
    config, state = load_hf(folder)
    assert config == CONFIG
    opened = open_folder(folder)
    assert {name for name in meant if name in opened.slots} == set(meant)
    for name, value in meant.items():
        slot = opened.slots[name]
        assert torch.equal(slot.view(state[slot.name]), value)
    before = built().state_dict()
    for name in state:
        torch.testing.assert_close(state[name], before[name], rtol=1 / 16, atol=2e-3)


def test_fp8_without_fitting_scales_is_refused(folder):
    make_fp8(folder)
    name = "model.layers.0.self_attn.o_proj.weight"
    good = load_file(folder / "model.safetensors")[f"{name}_scale_inv"]
    for scale, message in (
        (None, rf"{name} is of type F8_E4M3 but {name}_scale_inv is missing"),
        (good[:1], r"o_proj\.weight has scales of shape \[1, 3\]; blocks of 16 x 8 need \[2, 3\]"),
        (good * 0, r"o_proj\.weight has a scale that is not a positive number"),
    ):
        rewrite(
            folder,
            lambda t, s=scale: t.pop(f"{name}_scale_inv", None) if s is None else t.update({f"{name}_scale_inv": s}),
        )
        with pytest.raises(ValueError, match=message):
            load_hf(folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["weight_block_size"] = [0, 8]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"weight_block_size=\[0, 8\]: must be two positive"):
        open_folder(folder)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_dequantising_multiplies_each_number_by_its_blocks_scale(rows, columns, high, wide):
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // high), -(-columns // wide), generator=generator) + 0.1
    out = dequantise(weight, scale, (high, wide))
    i, j = rows - 1, columns - 1
    for a, b in ((0, 0), (i, 0), (0, j), (i, j), (i // 2, j // 2)):
        assert out[a, b] == weight[a, b].float() * scale[a // high, b // wide]


def test_powers_of_two_may_be_stored_as_such():
    weight = torch.ones(2, 4).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 4.0]])
    out = dequantise(weight, scale.to(torch.float8_e8m0fnu), (2, 2))
    assert torch.equal(out, torch.tensor([[0.25, 0.25, 4.0, 4.0]] * 2))


def test_a_folder_in_blocks_is_read_back_within_their_rounding(tmp_path):
    from safetensors import safe_open

    config = dataclasses.replace(EXPORTABLE, hidden_size=192)  # blocks that the matrices do not fill
    model = Transformer(config)
    init_weights(model, config, seed=0)
    folder, tokenizer = tmp_path / "hf", save_tokenizer(tmp_path / "tokenizer")
    folder.mkdir()
    save_hf(
        folder, config, model.state_dict(), tokenizer_folder=tokenizer, model_card="", dtype=torch.float8_e4m3fn,
        max_shard_bytes=200_000,
    )  # fmt: skip
    values = json.loads((folder / "config.json").read_text())
    assert values["quantization_config"]["weight_block_size"] == [128, 128] and values["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    kinds = {}
    for name, file in index.items():
        with safe_open(folder / file, "pt") as shard:
            kinds[name] = shard.get_slice(name).get_dtype()
    assert kinds["model.layers.1.mlp.experts.0.down_proj.weight"] == "F8_E4M3"
    assert kinds["model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"] == "F32"
    unrounded = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight")
    assert {kinds[name] for name in (*unrounded, "model.layers.3.eh_proj.weight")} == {"BF16"}
    _, state = load_hf(folder)
    for name, tensor in model.state_dict().items():
        step = 2**-4 if tensor.dim() > 1 else 2**-8
        small = 2**-9 * 2.0 * tensor.abs().max() / 448  # E4M3's smallest number, times the scale
        assert bool(((state[name] - tensor).abs() <= step * tensor.abs() + small).all()), name
