"""Reading checkpoints: the whole ones are found, held against their manifest, and loaded into any layout.

What carries the name `step_XXXXXXXX` was written to its end (`checkpoint_writer`); damage since then is found by the
SHA-256 sums, file by file, before anything is loaded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from model.parallel.collectives import Axis, collective
from model.parallel.mesh import Mesh
from ray_pipeline.engine.checkpoints.checkpoint_format import (
    FORMAT,
    SOURCE_FOLDER,
    STATE_FILE,
    differences,
    global_shape,
    loaded,
    placed,
    shape_differences,
    some,
    stored,
)
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import damage

# A single process is the point where torch warns about it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")
WORLD = Axis("all ranks")


class UnusableCheckpoint(UserError):
    """A checkpoint that cannot be loaded: `problem` says which file or setting, without a way out."""

    def __init__(self, path: Path, problem: str, way_out: str = ""):
        super().__init__(f"{problem}. {way_out}".strip())
        self.path, self.problem = path, problem


class DamagedCheckpoint(UnusableCheckpoint):
    """A file of it is missing or is not what was written."""


class ForeignCheckpoint(UnusableCheckpoint):
    """It belongs to another model."""


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of `step_name`."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def find_damage(path: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the first file that is not as it was written; None where all is well.

    Args:
        share: (index, count) of a rank among those that share the work.
    """
    found = damage(path, share=share)
    if found is None and share[0] == 0:
        try:
            step = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, KeyError) as error:
            return f"{path / STATE_FILE}: damaged ({error})"
        if step != step_of(path):
            return f"{path / STATE_FILE}: of step {step}, in the folder of step {step_of(path)}"
    return found


def newest_whole(folder: Path, *, before: Path) -> Path | None:
    """The newest checkpoint older than `before` whose files are all as they were written."""
    older = [path for path in list_checkpoints(folder) if path.name < before.name]
    return next((path for path in reversed(older) if find_damage(path) is None), None)


def source_files(folder: Path, step: int) -> dict[str, bytes]:
    """What the source of batches put into the checkpoint of `step`, by name; held against the manifest on loading."""
    return {path.name: path.read_bytes() for path in sorted((folder / step_name(step) / SOURCE_FOLDER).glob("*"))}


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Weights, moments and balancing biases into the engine, whatever layout it has.

    Returns:
        trainer.json: `step`, and in `extra` what the trainer stored.
    Raises:
        DamagedCheckpoint, ForeignCheckpoint: before anything is changed, on every rank alike.
    """
    mesh = engine.mesh
    problem = _first(mesh, lambda: find_damage(path, share=(mesh.rank, mesh.world)))
    if problem is not None:
        raise DamagedCheckpoint(path, problem, f"Delete {path} and resume: an older checkpoint is taken.")
    page = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    local = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in engine.state().items()}
    state = {key: stored(key, tensor) for key, tensor in local.items()}
    problem = _first(mesh, lambda: _foreign(page, path, engine, state))
    if problem is not None:
        raise ForeignCheckpoint(path, problem, f"Delete {path}, or resume with the settings it was written with.")
    whole: dict[str, Any] = {key: placed(key, tensor, mesh) for key, tensor in state.items()}
    with collective(WORLD, "loading a checkpoint"):
        dcp.load(whole, checkpoint_id=path, no_dist=not dist.is_initialized())
    engine.load_state({key: loaded(key, tensor).to(engine.device) for key, tensor in state.items()})
    return page


def _foreign(page: dict[str, Any], path: Path, engine: Engine, state: dict[str, Tensor]) -> str | None:
    """Why the checkpoint is not one of this model, or None."""
    if page.get("format") != FORMAT:
        return f"{path}: format {page.get('format', 1)} of an older version; this one reads format {FORMAT}"
    different = differences(page["model"], engine.config)
    if not different:
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        there = {key: tuple(entry.size) for key, entry in metadata.items() if hasattr(entry, "size")}
        sizes = {"tp": engine.mesh.sizes.tp, "ep": engine.mesh.sizes.ep}
        here = {key: global_shape(key, tensor, sizes) for key, tensor in state.items()}
        different = shape_differences(there, here)
    return f"{path}: a checkpoint of another model: {some(different)}" if different else None


def _first(mesh: Mesh, find: Callable[[], T | None]) -> T | None:
    """What the first rank that finds anything finds; known to all."""
    found = [find()]
    if mesh.world > 1:
        everyone: list[Any] = [None] * mesh.world
        with collective(WORLD, "all-gather"):
            dist.all_gather_object(everyone, found[0])
        found = everyone
    return next((value for value in found if value is not None), None)
