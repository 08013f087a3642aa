"""A model folder from elsewhere as its config.json and file headers describe it. Reads no tensor; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from model.config import ModelConfig, RopeScaling
from model.convert.hf_config import check_types, config_from_hf
from model.convert.json_values import short
from model.convert.weight_files import LoadLimits, StoredTensor, read_object, stored_tensors


@dataclass(frozen=True)
class Selection:
    """Which of the files' tensors are taken; patterns are globs or beginnings of the names in the files.

    Attributes:
        include: take these alone (empty: all). exclude: leave these. allow_missing: these may be absent.
            What is not taken starts from fresh weights.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    allow_missing: Sequence[str] = ()

    def takes(self, name: str) -> bool:
        """Whether a tensor is read where the files have it."""
        return (not self.include or matches(name, self.include)) and not matches(name, self.exclude)

    def may_miss(self, name: str) -> bool:
        """Whether the model does without a tensor from the files."""
        return not self.takes(name) or matches(name, self.allow_missing)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is a glob or the beginning of the name."""
    return any(name.startswith(pattern) or fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Description:
    """What a folder says of itself.

    Attributes:
        values: config.json. native: it is this project's own format. stored: every tensor of the files by name.
    """

    values: dict[str, Any]
    native: bool
    config: ModelConfig
    stored: dict[str, StoredTensor]


def describe(path: Path, selection: Selection | None = None, limits: LoadLimits | None = None) -> Description:
    """Config and headers, each checked by itself.

    MTP modules that the config announces and the files do not hold are dropped, as transformers does not save them;
    unless `allow_missing` speaks for them.

    Raises:
        ValueError: a config this code cannot honour, a damaged file, or a limit that is exceeded.
    """
    selection, limits = selection or Selection(), limits or LoadLimits()
    values = read_object(path / "config.json")
    config, native = read_config(values), is_native(values)
    if config.vocab_size > limits.vocab_size:
        raise ValueError(
            f"{path / 'config.json'}: vocab_size={config.vocab_size}: more than max_vocab_size={limits.vocab_size}"
        )
    stored = stored_tensors(path, limits)
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    held = native or any(name.startswith(first_mtp) for name in stored)
    if not held and not matches(first_mtp + "eh_proj.weight", selection.allow_missing):
        config = replace(config, num_nextn_predict_layers=0)
    return Description(values, native, config, stored)


def is_native(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is this project's: a plain ModelConfig, weights under the names of its modules."""
    return "model_type" not in values and "attention" in values


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """config.json of a published model, or of this project's own format.

    Raises:
        ValueError: naming the key this code cannot honour.
    """
    if not is_native(values):
        return config_from_hf(values)
    unknown = sorted(set(values) - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise ValueError(f"config.json: unknown keys {', '.join(unknown)[:200]}")
    check_types(values)
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and not all(isinstance(v, int | float) for v in scaling.values()):
        raise ValueError(f"config.json: rope_scaling={short(scaling)}: its values must be numbers")
    try:
        given = dict(values) | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)}
    except TypeError as error:
        raise ValueError(f"config.json: rope_scaling={short(scaling)} is not one ({short(str(error))})") from None
    config = ModelConfig(**given)
    config.validate()
    return config
