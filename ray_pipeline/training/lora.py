"""A stage's trained adapters in peft's own format, to be used with the model that the stage started from."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.convert.hf import save_tensors
from model.convert.hf_config import published_family
from model.convert.names import published_name
from ray_pipeline.engine.adapters import peft_config
from ray_pipeline.engine.engine import Engine
from ray_pipeline.records.artifacts import atomic_folder
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.run_folder import ADAPTER
from ray_pipeline.training.rank import Rank

_PREFIX = "base_model.model."  # what peft puts before the names of the model it wraps


def save_adapter(rank: Rank, engine: Engine, settings: LoraConfig) -> None:
    """Gather the adapters of all pipeline ranks; rank 0 writes `folder/adapter`."""
    state = engine.adapter_state()
    if rank.is_main:
        write_adapter(rank.folder / ADAPTER, engine.config, settings, state)
    if dist.is_initialized():
        dist.barrier()


def write_adapter(folder: Path, model: ModelConfig, settings: LoraConfig, state: dict[str, Tensor]) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`.

    Names are those of the Hugging Face model where the architecture is published, so that peft puts the adapter on what
    transformers loads (which has no MTP modules and leaves theirs aside); else our own. Adapters on feed-forward layers
    of a published mixture of experts it cannot put there: peft takes every `down_proj` for the routed experts'.

    Args:
        state: `Engine.adapter_state`.
    """
    published = published_family(model) is not None
    names = {name: published_name(model, name) if published else name for name in state}
    layers = {name.removesuffix(".weight").rpartition(".")[0] for name in names.values()}
    config = peft_config(settings, sorted(layers))
    with atomic_folder(folder) as aside:
        config.save_pretrained(aside)
        path = aside / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["target_modules"].sort()  # a set there: its order changes from run to run
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tensors({_PREFIX + names[name]: t for name, t in state.items()}, aside / "adapter_model.safetensors")
