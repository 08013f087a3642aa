"""The end of a training stage: its weights as one whole model, and where the next stage reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.parallel.whole_tensors import WholeTensors
from ray_pipeline.engine.engine import Engine
from ray_pipeline.records.artifacts import save_model_by_tensors
from ray_pipeline.records.stored_weights import open_model
from ray_pipeline.settings.chain import input_stage
from ray_pipeline.settings.run_folder import MODEL
from ray_pipeline.training.initial import initial_state
from ray_pipeline.training.rank import Rank


def save_trained_model(rank: Rank, engine: Engine) -> None:
    """Rank 0 writes `folder/model` (safetensors, config, manifest) from the slices of all ranks."""
    rank.phase("saving")
    save_whole(rank, engine, rank.folder / MODEL)


def save_whole(rank: Rank, engine: Engine, folder: Path) -> None:
    """The engine's model as one, each tensor on rank 0 alone and one at a time; it is there when this returns.

    Raises:
        UserError: full disk or no right to write.
    """
    tensors = WholeTensors(engine.shards(), rank.mesh)
    if rank.is_main:
        save_model_by_tensors(folder, engine.config, tensors.shapes, (t for t in tensors if t is not None))
    else:
        for _ in tensors:
            pass
    if dist.is_initialized():
        dist.barrier()


def read_input(rank: Rank) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Config and weights of the model this stage starts or learns from: an earlier stage's, each tensor read when it is
    asked for, or `init_from`'s.

    Raises:
        UserError: a file of it is damaged.
    """
    stage = input_stage(rank.config, rank.stage)
    if stage is None:
        state = initial_state(rank.config)
        assert state is not None, "the settings were checked: without an earlier stage there is init_from"
        return rank.config.model, state
    return open_model(rank.upstream[stage] / MODEL)
