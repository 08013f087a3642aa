"""Checkpoints free of layout: torch DCP files under global parameter names, whole or not at all.

A checkpoint is written aside, gets a manifest of SHA-256 sums, and is renamed into place; so what carries the name
`step_XXXXXXXX` is whole. Any layout can load what any other saved.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ray_pipeline.artifacts import sync_to_disk, verify_folder, write_manifest
from ray_pipeline.engine.engine import Engine

STATE_FILE = "trainer.json"


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _state(engine: Engine) -> dict[str, Tensor]:
    assert engine.updater is not None
    buffers = {f"model.{name}": b for name, b in engine.model.state_dict().items() if name.endswith("correction_bias")}
    return engine.updater.state() | buffers


def save_checkpoint(engine: Engine, folder: Path, step: int, extra: dict[str, Any], *, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX` from all ranks and drop all but the newest `keep`.

    Args:
        step: optimizer steps taken. extra: what else the trainer needs to go on, as JSON.
    """
    final = folder / f"step_{step:08d}"
    aside = folder / f".{final.name}.partial"
    rank_zero = engine.mesh.rank == 0
    if rank_zero:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _barrier()
    state: dict[str, Any] = {name: tensor.contiguous() for name, tensor in _state(engine).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a single process is used, which is the point
        dcp.save(state, checkpoint_id=aside, no_dist=not dist.is_initialized())
    if rank_zero:
        (aside / STATE_FILE).write_text(json.dumps({"step": step, **extra}))
        write_manifest(aside)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        aside.rename(final)
        sync_to_disk(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Weights, moments and balancing biases into the engine; returns what `extra` held, and `step`.

    Raises:
        UserError: naming the file that is damaged or missing.
    """
    assert engine.updater is not None
    if engine.mesh.rank == 0:
        verify_folder(path)
    _barrier()
    state: dict[str, Any] = {name: torch.empty_like(tensor) for name, tensor in _state(engine).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    engine.updater.load_state(state)
    own = engine.model.state_dict()
    with torch.no_grad():
        for name, buffer in own.items():
            if name.endswith("correction_bias"):
                buffer.copy_(state[f"model.{name}"])
    return json.loads((path / STATE_FILE).read_text())
