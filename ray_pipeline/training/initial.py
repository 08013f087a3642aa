"""The weights PRETRAIN starts from, where `--init-from` names a folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from model.convert.hf_load import ModelFolder, open_folder, read_state
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import own_damage
from ray_pipeline.settings.init_from import limits_of, selection_of
from ray_pipeline.settings.run_folder import MANIFEST
from ray_pipeline.settings.schema import PipelineFields


def open_initial(config: PipelineFields) -> ModelFolder | None:
    """The folder, its headers held against `config.model`; None where training starts from random weights.

    Raises:
        UserError: no such folder, a damaged file, or tensors that are not those of the model, by name.
    """
    if config.init_from.path is None:
        return None
    path = Path(config.init_from.path)
    if not path.is_dir():
        raise UserError(f"--init-from {path}: no such folder. Give one with config.json and safetensors files.")
    if found := own_damage(path):  # one that EXPORT wrote says what its files were
        raise UserError(f"--init-from {found}. Export it again, or delete {MANIFEST} there if the change was meant.")
    try:
        return open_folder(path, selection_of(config.init_from), limits_of(config.init_from))
    except ValueError as error:
        raise UserError(f"--init-from {error}") from None


def initial_state(config: PipelineFields) -> dict[str, Tensor] | None:
    """Whole parameters by name; what the folder does not give is drawn from the run's seed.

    Raises:
        UserError: as `open_initial`, or a tensor that cannot be read or is not finite.
    """
    folder = open_initial(config)
    if folder is None:
        return None
    try:
        return read_state(folder, seed=config.seed)
    except ValueError as error:
        raise UserError(f"--init-from {error}") from None
