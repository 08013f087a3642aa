"""The end of a training stage: its weights as one whole model, and where the next stage reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from ray_pipeline.engine.engine import Engine
from ray_pipeline.records.artifacts import save_model
from ray_pipeline.records.stored_weights import open_model
from ray_pipeline.settings.chain import input_stage
from ray_pipeline.settings.run_folder import MODEL
from ray_pipeline.training.initial import initial_state
from ray_pipeline.training.rank import Rank


def save_trained_model(rank: Rank, engine: Engine) -> None:
    """Gather the stages' weights; rank 0 writes `folder/model` (safetensors, config, manifest)."""
    rank.phase("saving")
    state = engine.full_state()
    if rank.is_main:
        save_model(rank.folder / MODEL, engine.config, state)
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
