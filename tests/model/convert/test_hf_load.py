"""What comes from elsewhere is taken in whole, in part, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.convert.folder import Selection
from model.convert.fp8_blocks import dequantise
from model.convert.hf import save_hf
from model.convert.hf_load import load_hf, open_folder, read_state
from model.convert.weight_files import LoadLimits, stored_tensors
from model.init import init_weights, initial_weight
from model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A V3 model with one MTP module, in one file."""
    return written(tmp_path)


def written(tmp_path: Path, **options) -> Path:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    model = built()
    save_hf(tmp_path / "hf", CONFIG, model.state_dict(), tokenizer_folder=tokenizer, model_card="", **options)
    return tmp_path / "hf"


def built() -> Transformer:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=1)
    return model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_excluded_tensors_start_fresh_and_the_rest_is_read(folder):
    selection = Selection(exclude=["model.layers.1.mlp.experts.*.up_proj.weight", "lm_head"])
    opened = open_folder(folder, selection)
    assert opened.fresh == ("layers.1.mlp.experts.gate_up_proj", "lm_head.weight")
    _, state = load_hf(folder, selection=selection, seed=7)
    before = built().state_dict()
    for name, tensor in state.items():
        if name not in opened.fresh:
            assert torch.equal(tensor, before[name])
    fresh = {name: initial_weight(name, before[name].shape, CONFIG, 7) for name in opened.fresh}
    assert torch.equal(state["lm_head.weight"], fresh["lm_head.weight"])
    stacked = "layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(state[stacked][:, :16], before[stacked][:, :16])
    assert torch.equal(state[stacked][:, 16:], fresh[stacked][:, 16:])


def test_included_tensors_alone_are_read(folder):
    opened = open_folder(folder, Selection(include=["model.embed_tokens", "model.layers.0."]))
    assert {name.split(".")[0] for name in opened.fresh} == {"layers", "norm", "lm_head", "mtp"}
    assert all(not name.startswith("layers.0.") for name in opened.fresh)
    assert {name.split(".")[1] for name in opened.slots} == {"embed_tokens", "layers"}


def test_a_tensor_that_may_be_missing_starts_fresh(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"))
    with pytest.raises(ValueError, match="e_score_correction_bias is missing"):
        open_folder(folder)
    _, state = load_hf(folder, selection=Selection(allow_missing=["*.e_score_correction_bias"]))
    assert torch.equal(state["layers.1.mlp.gate.e_score_correction_bias"], torch.zeros(4))


def test_mtp_modules_that_are_not_there_are_dropped_or_started_fresh(folder):
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.2.")])
    assert open_folder(folder).config == dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    opened = open_folder(folder, Selection(allow_missing=["model.layers.2."]))
    assert opened.config == CONFIG
    assert opened.fresh and all(name.startswith("mtp.0.") for name in opened.fresh)


def test_everything_that_does_not_fit_is_listed(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.ones(3, 2)
        tensors["model.layers.0.odd"] = torch.ones(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # old files hold it: left alone
        tensors["model.layers.1.mlp.gate.weight"] = torch.ones(4, 32, dtype=torch.int8)

    rewrite(folder, change)
    with pytest.raises(ValueError) as refused:
        open_folder(folder)
    assert str(refused.value).splitlines() == [
        f"{folder}: the weights are not those of its config.json:",
        "  model.norm.weight is missing",
        "  lm_head.weight has shape [3, 2], config.json asks for [64, 32]",
        "  model.layers.0.odd is not part of the model",
        "  model.layers.1.mlp.gate.weight is of type I8, which no weight has",
        "`exclude` leaves tensors out, `allow_missing` starts what is not there from fresh weights.",
    ]
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "experts" in k])
    with pytest.raises(ValueError, match=r"and \d+ more\n"):
        open_folder(folder)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] = ord("[")
    path.write_bytes(content)


def with_header(path: Path, change) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def overlapping(path: Path) -> None:
    with_header(path, lambda h: h["model.norm.weight"].update(data_offsets=[0, 128]))


def wrong_shape(path: Path) -> None:
    with_header(path, lambda h: h["lm_head.weight"].update(shape=[64, 33]))


def negative(path: Path) -> None:
    with_header(path, lambda h: h["lm_head.weight"].update(shape=[-64, -32]))


def strange_type(path: Path) -> None:
    with_header(path, lambda h: h["lm_head.weight"].update(dtype="F4"))


def no_offsets(path: Path) -> None:
    with_header(path, lambda h: h["lm_head.weight"].pop("data_offsets"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "cut short"),
        (longer, "longer than its tensors"),
        (empty, "not a whole safetensors file"),
        (long_header, "not a whole safetensors file"),
        (no_json, "header is damaged"),
        (overlapping, "are not where its shape says"),
        (wrong_shape, "lm_head.weight are not where its shape says"),
        (negative, r"impossible shape \[-64, -32\]"),
        (strange_type, "type F4, which is not read"),
        (no_offsets, "header is damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name_before_a_tensor_is_read(damage, message, folder):
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        open_folder(folder)


@given(st.integers(0, 400), st.integers(0, 255))
def test_no_change_to_a_header_is_read_as_something_else(tmp_path_factory, at, value):
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    try:
        found = stored_tensors(path.parent, LoadLimits())
    except ValueError as refused:
        assert str(path) in str(refused)
    else:  # another name or other numbers are still a whole file
        assert sum(math.prod(entry.shape) for entry in found.values()) in (10, 14, 17)


def test_a_number_that_is_not_finite_is_refused(folder):
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.norm\.weight holds a number that is not finite"):
        load_hf(folder)


def test_a_file_that_changes_after_the_check_is_named(folder):
    opened = open_folder(folder)
    cut_short(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .* cannot be read \("):
        read_state(opened)


def test_shards_must_be_what_the_index_says(tmp_path):
    folder = written(tmp_path, max_shard_bytes=40_000)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, file = next(iter(values["weight_map"].items()))
    for other, message in (
        ("../hf/" + file, "which is not one of the folder's own"),
        ("missing.safetensors", "missing; model.safetensors.index.json lists it"),
        (sorted(set(values["weight_map"].values()))[-1], f"does not hold {first}"),
    ):
        index.write_text(json.dumps({"weight_map": values["weight_map"] | {first: other}}))
        with pytest.raises(ValueError, match=message):
            open_folder(folder)
    for text, message in (('{"weight_map": 3}', "must name a file"), ("[]", "a JSON object"), ("{", "not valid JSON")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_folder(folder)


def test_what_asks_for_too_much_is_refused(folder):
    with pytest.raises(ValueError, match="vocab_size=64: more than max_vocab_size=63"):
        open_folder(folder, limits=LoadLimits(vocab_size=63))
    with pytest.raises(ValueError, match="more than max_file_bytes=1000"):
        open_folder(folder, limits=LoadLimits(file_bytes=1000))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        open_folder(folder)
    (folder / "config.json").write_bytes(b" " * ((1 << 26) + 1))
    with pytest.raises(ValueError, match="more than the 67108864"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no such file"):
        open_folder(folder)


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


def test_our_own_format_is_read_under_its_own_names(tmp_path):
    config = dataclasses.replace(CONFIG, attention="gqa", num_key_value_heads=1, head_dim=16, norm="dyt")
    model = Transformer(config)
    init_weights(model, config, seed=3)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    read, state = load_hf(tmp_path)
    assert read == config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    for change, message in (
        ({"odd": 1}, "unknown keys odd"),
        ({"rope_scaling": {"odd": 1}}, "rope_scaling={'odd': 1} is not one"),
        ({"hidden_size": "a"}, "hidden_size='a': must be a whole number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config) | change))
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path)
