"""Files are whole or absent, and damage is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig, RopeScaling
from model.transformer import Transformer
from ray_pipeline.errors import UserError
from ray_pipeline.records import artifacts
from ray_pipeline.records.integrity import verify_folder

TOY = ModelConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    n_routed_experts=4, max_position_embeddings=32, rope_scaling=RopeScaling(2.0, 16),
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Transformer]:
    model = Transformer(TOY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    artifacts.save_model(tmp_path / "model", TOY, model.state_dict())
    return tmp_path / "model", model


def test_saved_model_loads_with_the_same_config_and_bits(saved):
    folder, model = saved
    loaded = artifacts.load_model(folder)
    assert loaded.config == TOY
    assert artifacts.weights_digest(folder) == artifacts.weights_digest(model.state_dict())
    assert artifacts.weights_digest(loaded.state_dict()) == artifacts.weights_digest(folder)


def test_views_of_one_buffer_are_saved(tmp_path):
    model = Transformer(TOY)
    state = model.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view(tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)}
    artifacts.save_model(tmp_path / "model", TOY, views)
    assert artifacts.weights_digest(tmp_path / "model") == artifacts.weights_digest(state)


def test_saving_again_replaces_the_model(saved):
    folder, model = saved
    before = artifacts.weights_digest(folder)
    artifacts.save_model(folder, TOY, {name: tensor + 1 for name, tensor in model.state_dict().items()})
    assert artifacts.weights_digest(folder) != before
    verify_folder(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_file_is_named(saved, name):
    folder, _ = saved
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"{name}: damaged: its SHA-256"):
        artifacts.load_model(folder)


def test_truncated_file_is_named(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged: \d+ bytes, written were \d+"):
        verify_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_missing_file_is_named(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        artifacts.load_model(folder)


@pytest.mark.parametrize("made", ["folder", "with manifest", "file", "link"])
def test_a_path_that_was_not_made_here_is_not_replaced(saved, tmp_path, made):
    folder = saved[0] if made == "with manifest" else tmp_path / "mine"
    if made == "file":
        folder.write_text("mine")
    elif made == "link":
        (tmp_path / "there").mkdir()
        folder.symlink_to(tmp_path / "there")
    else:
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"is not replaced.* Give another path"), artifacts.atomic_folder(folder):
        raise AssertionError("nothing is begun")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_kill_between_the_two_renames_of_a_folder_loses_neither(saved):
    folder, model = saved
    folder.rename(folder.with_name(".model.old"))
    with pytest.raises(ZeroDivisionError), artifacts.atomic_folder(folder):
        raise ZeroDivisionError
    assert artifacts.weights_digest(folder) == artifacts.weights_digest(model.state_dict())


def test_a_folder_in_the_way_of_a_file_is_told(tmp_path):
    (tmp_path / "record.json").mkdir()
    with pytest.raises(UserError, match=r"record\.json: a folder is in the way of a file"):
        artifacts.write_json(tmp_path / "record.json", {})


def test_full_disk_is_a_user_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    artifacts.write_json(path, {"step": 1})
    with (
        pytest.raises(UserError, match=r"record\.json: the disk is full .* Free some space"),
        artifacts.atomic_path(path) as aside,
    ):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert artifacts.read_json(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_really_full_device_is_told(tmp_path):
    (tmp_path / ".x.json.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        artifacts.write_json(tmp_path / "x.json", [1] * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_saving_a_model_keeps_the_old_one(saved, monkeypatch):
    import safetensors.torch

    folder, model = saved
    before = artifacts.weights_digest(folder)

    def full(*args):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        artifacts.save_model(folder, TOY, model.state_dict())
    assert artifacts.weights_digest(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_folder_where_a_file_is_in_the_way_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"a file is in the way of a folder .* Choose another --output-dir"):
        artifacts.write_json(tmp_path / "runs" / "x" / "record.json", {})


def test_place_without_rights_is_told(tmp_path):
    error = artifacts.explain_write_error(PermissionError(errno.EACCES, "Permission denied"), tmp_path / "x")
    assert isinstance(error, UserError)
    assert "cannot be written (Permission denied)" in str(error)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="odd"), artifacts.writing(tmp_path):
        raise OSError(errno.EIO, "odd")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "record.json").write_text('{"step": ')
    with pytest.raises(UserError, match=r"record\.json: damaged"):
        artifacts.read_json(tmp_path / "record.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"record\.json: no such file"):
        artifacts.read_json(tmp_path / "record.json")


@given(st.integers(0, 5), st.floats(-4, 4, width=32), st.sampled_from(["a", "b"]))
def test_digest_changes_with_any_value_name_shape_or_dtype(index, value, name):
    base = {"a": torch.zeros(2, 3), "c": torch.ones(())}
    digest = artifacts.weights_digest(base)
    changed = {name: torch.zeros(2, 3), "c": torch.ones(())}
    changed[name].view(-1)[index] = value
    # -0.0 differs from 0.0 in its bits.
    same = name == "a" and torch.equal(changed["a"].view(torch.int32), base["a"].view(torch.int32))
    assert (artifacts.weights_digest(changed) == digest) == same
    assert artifacts.weights_digest(base | {"a": torch.zeros(3, 2)}) != digest
    assert artifacts.weights_digest(base | {"a": torch.zeros(2, 3, dtype=torch.int32)}) != digest
