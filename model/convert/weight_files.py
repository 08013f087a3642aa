"""The files of a published model, checked before a tensor is read: whole, not too large, in the folder. No torch.

Format: https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_JSON = 1 << 26  # bytes; the index of the largest published model has 9 MB
_MAX_HEADER = 100_000_000  # safetensors' own limit
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class LoadLimits:
    """What a folder from elsewhere may ask of this machine.

    Attributes:
        vocab_size: most entries of the embedding. file_bytes: largest single weight file.
    """

    vocab_size: int = 1_000_000
    file_bytes: int = 100_000_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give a folder that save_pretrained or this project's export wrote.")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than the {_MAX_JSON} that are read of such a file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, but holds a {type(value).__name__}")
    return value


def stored_tensors(folder: Path, limits: LoadLimits) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weight files by name, from the headers alone.

    Raises:
        ValueError: naming the file that is missing, too large, cut short or damaged, or that contradicts the index.
    """
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there; other weight formats are not read")
        return _header(folder / _SINGLE, limits)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor")
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in (".", ".."):
            raise ValueError(f"{index}: names the file {file!r}, which is not one of the folder's own")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing; {_INDEX} lists it")
        header = _header(folder / file, limits)
        wrong = [name for name, place in weight_map.items() if place == file and name not in header]
        if wrong:
            raise ValueError(f"{folder / file}: does not hold {wrong[0]}, which {_INDEX} says it does")
        found |= {name: entry for name, entry in header.items() if weight_map.get(name) == file}
    return found


def _header(path: Path, limits: LoadLimits) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise ValueError(f"{path}: {size} bytes, more than max_file_bytes={limits.file_bytes}")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a whole safetensors file ({size} bytes, a header of {length} announced)")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: StoredTensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in entries.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})") from None
    _check_spans(path, tensors, spans, size - 8 - length)
    return tensors


def _check_spans(path: Path, tensors: dict[str, StoredTensor], spans: list[Any], size: int) -> None:
    """Tensors lie one behind the other, each as long as its shape says, and end where the file ends."""
    at = 0
    for begin, end, name in spans:
        entry = tensors[name]
        if entry.dtype not in _BITS:
            raise ValueError(f"{path}: {name} is of type {entry.dtype}, which is not read")
        if not all(isinstance(dim, int) and dim >= 0 for dim in entry.shape):
            raise ValueError(f"{path}: {name} has the impossible shape {list(entry.shape)}")
        if begin != at or end - begin != math.prod(entry.shape) * _BITS[entry.dtype] // 8:
            raise ValueError(f"{path}: the bytes of {name} are not where its shape says: the header is damaged")
        at = end
    if at != size:
        state = "cut short" if at > size else "longer than its tensors"
        raise ValueError(f"{path}: {state}: {size} bytes of tensors, the header lists {at}")
