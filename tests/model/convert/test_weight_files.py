"""A safetensors file that is not whole is refused before a tensor of it is read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.convert.hf_load import open_folder
from model.convert.weight_files import LoadLimits, stored_tensors


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
