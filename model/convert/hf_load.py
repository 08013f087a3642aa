"""Reading a model folder from elsewhere: a published DeepSeek-V2, V3 or V3.2 checkpoint, or this project's own export.

Files are mapped into memory and read one tensor at a time into their places, so no more than the model and one tensor
is held. Everything that can be wrong is found from config.json and the headers before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.convert.folder import Selection, describe
from model.convert.fp8_blocks import SCALE_SUFFIX, block_size, dequantise
from model.convert.names import Slot, published_slots
from model.convert.selected import fresh_parameter
from model.convert.weight_files import LoadLimits, StoredTensor
from model.transformer import Transformer

MOST_EXPERTS = 200_000  # of all layers; the largest published model has 15,000
MOST_LAYERS = 300  # that are built without a look at how many tensors there are
_SHOWN = 12  # problems listed by name
_FLOAT8 = "F8_E4M3"
_WEIGHTS = {"F64", "F32", "F16", "BF16", _FLOAT8}


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose config and headers fit together.

    Attributes:
        slots: name in the files -> place in the state dict, for every tensor that will be read.
        fresh: parameters of which some part is not in the files.
    """

    path: Path
    config: ModelConfig
    slots: dict[str, Slot]
    stored: dict[str, StoredTensor]
    shapes: dict[str, torch.Size]
    fresh: tuple[str, ...]
    block: tuple[int, int]


def open_folder(path: Path, selection: Selection | None = None, limits: LoadLimits | None = None) -> ModelFolder:
    """Hold the headers against the architecture; reads no tensor.

    Raises:
        ValueError: from `describe`, or every tensor that is missing, unknown, or of another shape or type than the
            config asks for.
    """
    selection = selection or Selection()
    found = describe(path, selection, limits)
    config, stored = found.config, found.stored
    _check_size(path, config, len(stored))
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    expected = {name: Slot(name) for name in state} if found.native else published_slots(config, state)
    problems, slots = _compare(config, expected, state, stored, selection)
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listing = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        raise ValueError(
            f"{path}: the weights are not those of its config.json:\n{listing}{more}\n"
            "`exclude` leaves tensors out, `allow_missing` starts what is not there from fresh weights."
        )
    taken = {(slot.name, slot.expert, slot.part) for slot in slots.values()}
    fresh = {s.name for s in expected.values() if not s.shared and (s.name, s.expert, s.part) not in taken}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return ModelFolder(path, config, slots, stored, shapes, tuple(sorted(fresh)), block_size(found.values))


def _check_size(path: Path, config: ModelConfig, stored: int) -> None:
    """Refuse an architecture whose tensors alone would take minutes to list."""
    experts = config.num_hidden_layers * config.n_routed_experts
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"{path / 'config.json'}: num_hidden_layers={config.num_hidden_layers} with n_routed_experts="
            f"{config.n_routed_experts} are {experts} experts, more than the {MOST_EXPERTS} that any model has"
        )
    if config.num_hidden_layers > max(MOST_LAYERS, stored):
        raise ValueError(
            f"{path / 'config.json'}: num_hidden_layers={config.num_hidden_layers}, but the files hold {stored} tensors"
        )


def _compare(
    config: ModelConfig,
    expected: Mapping[str, Slot],
    state: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    selection: Selection,
) -> tuple[list[str], dict[str, Slot]]:
    """Problems as sentences, and what is to be read."""
    problems = [
        f"{name} is missing"
        for name, slot in expected.items()
        if not slot.shared and name not in stored and not selection.may_miss(name)
    ]
    slots: dict[str, Slot] = {}
    for name, entry in stored.items():
        slot = expected.get(name)
        if not selection.takes(name):
            continue
        if slot is None:
            if not _is_known_extra(config, name, stored):
                problems.append(f"{name} is not part of the model")
            continue
        if slot.shared:
            continue
        shape = slot.view(state[slot.name]).shape
        if entry.shape != tuple(shape):
            problems.append(f"{name} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        elif entry.dtype not in _WEIGHTS:
            problems.append(f"{name} is of type {entry.dtype}, which no weight has")
        elif entry.dtype == _FLOAT8 and name + SCALE_SUFFIX not in stored:
            problems.append(f"{name} is of type {entry.dtype} but {name}{SCALE_SUFFIX} is missing")
        else:
            slots[name] = slot
    return problems, slots


def _is_known_extra(config: ModelConfig, name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """What published files hold beside weights: scales, old rotary tables, MTP layers the config does not count."""
    if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in stored:
        return True
    parts = name.split(".")
    beyond = config.num_hidden_layers + config.num_nextn_predict_layers
    if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isdecimal():
        return int(parts[2]) >= beyond or name.endswith(".rotary_emb.inv_freq")
    return False


def read_state(folder: ModelFolder, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The whole Transformer state dict; what is not in the files is drawn from the seed as for a new model.

    Raises:
        ValueError: naming the file and tensor that cannot be read or holds a number that is not finite.
    """
    state = {}
    for name, shape in folder.shapes.items():
        if name in folder.fresh:
            state[name] = fresh_parameter(name, shape, folder.config, seed).to(dtype)
        else:
            state[name] = torch.empty(shape, dtype=dtype)
    by_file: dict[Path, list[str]] = {}
    for name in folder.slots:
        by_file.setdefault(folder.stored[name].file, []).append(name)
    for path, names in by_file.items():
        for name in names:
            value = _read(folder, path, name)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{path}: {name} holds a number that is not finite")
            slot = folder.slots[name]
            slot.view(state[slot.name]).copy_(value)
    return state


def _read(folder: ModelFolder, path: Path, name: str) -> Tensor:
    """One tensor, dequantised where it is float8."""
    value = _stored(path, name)
    if folder.stored[name].dtype != _FLOAT8:
        return value
    scale = name + SCALE_SUFFIX
    try:
        return dequantise(value, _stored(folder.stored[scale].file, scale), folder.block)
    except ValueError as error:
        raise ValueError(f"{path}: {name} {error}") from None


def _stored(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: a mapping keeps the pages it has touched, and a header is read in milliseconds.
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: {name} cannot be read ({error})") from None


def load_hf(
    folder: Path, *, dtype: torch.dtype = torch.float32, selection: Selection | None = None, seed: int = 0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and Transformer state dict of a model folder: `open_folder`, then `read_state`."""
    opened = open_folder(folder, selection)
    return opened.config, read_state(opened, dtype=dtype, seed=seed)
