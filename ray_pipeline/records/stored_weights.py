"""Weights on disk as a mapping: each tensor is read when it is asked for, so that nobody holds the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from model.config import ModelConfig
from ray_pipeline.records.artifacts import read_model_config
from ray_pipeline.records.integrity import verify_folder


class StoredWeights(Mapping[str, Tensor]):
    """Whole tensors of a folder's safetensors files by name. One that was read is not kept.

    Raises:
        KeyError: no file has a tensor of that name.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_model(folder: Path) -> tuple[ModelConfig, StoredWeights]:
    """Config and weights of a model that `save_model` wrote, its files checked against the manifest.

    Raises:
        UserError: naming the file that is damaged or missing.
    """
    verify_folder(folder)
    return read_model_config(folder), StoredWeights(folder)
