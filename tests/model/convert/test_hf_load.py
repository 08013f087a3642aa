"""What comes from elsewhere is taken in whole, in part, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from model.convert.folder import Selection
from model.convert.hf_load import load_hf, open_folder, read_state
from model.convert.weight_files import LoadLimits
from model.init import init_weights, initial_weight
from model.transformer import Transformer
from tests.model.convert.folders import CONFIG, built, rewrite, written
from tests.model.convert.test_weight_files import cut_short


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
