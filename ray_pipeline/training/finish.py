"""The end of a training stage: its weights as one whole model, and where the next stage reads them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.transformer import Transformer
from ray_pipeline.artifacts import load_model, save_model
from ray_pipeline.engine.engine import Engine
from ray_pipeline.training.rank import Rank


def save_trained_model(rank: Rank, engine: Engine) -> None:
    """Gather the stages' weights; rank 0 writes `folder/model` (safetensors, config, manifest)."""
    rank.phase("saving")
    state = engine.full_state()
    if rank.is_main:
        save_model(rank.folder / "model", engine.config, state)
    if dist.is_initialized():
        dist.barrier()


def read_upstream(rank: Rank, stage: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Config and whole state dict of a finished stage's model."""
    model: Transformer = load_model(rank.upstream[stage] / "model")
    return model.config, model.state_dict()
