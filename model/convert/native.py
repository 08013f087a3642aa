"""A model in this project's own format, for architectures that no published class has.

A folder: config.json (a plain ModelConfig), model.safetensors under the names of our modules, tokenizer, model card.
`ray_pipeline.records.artifacts.load_model` and `model.convert.hf_load` read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.hf import MAX_SHARD_BYTES, copy_tokenizer, stored, write_weights
from model.convert.hf_config import special_token_ids


def save_native(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer_folder: Path,
    model_card: str,
    dtype: torch.dtype = torch.float32,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill `folder`, which the caller makes, and moves into place when this returns. Arguments as of `save_hf`."""
    settings = {
        "config.json": asdict(config),
        "generation_config.json": special_token_ids(tokenizer_folder) | (generation or {}),
    }
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_folder, folder, config)
    (folder / "README.md").write_text(model_card, encoding="utf-8")
    write_weights(folder, {name: stored(name, tensor, dtype) for name, tensor in state.items()}, max_shard_bytes)
