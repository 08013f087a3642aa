"""What the graphs of `graph_decoder` have in common as files: their inputs and outputs, and what lies beside them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert.graph_decoder import cache_width, num_caches
from model.convert.hf import copy_tokenizer
from model.convert.hf_config import published_family, special_token_ids, to_hf

INPUTS, OUTPUTS = ("input_ids", "attention_mask", "past"), ("logits", "present")


def save_beside(folder: Path, config: ModelConfig, tokenizer_folder: Path, model_card: str) -> None:
    """Config, end tokens, tokenizer and model card."""
    ids = special_token_ids(tokenizer_folder)
    values = asdict(config) if published_family(config) is None else to_hf(config) | ids
    for name, value in {"config.json": values, "generation_config.json": ids}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(tokenizer_folder, folder, config)
    (folder / "README.md").write_text(model_card, encoding="utf-8")


def graph_notes(config: ModelConfig) -> list[str]:
    """What a graph has otherwise than the model, a sentence each."""
    notes = []
    if config.is_moe_layer(config.num_hidden_layers - 1):
        notes.append(
            f"every token goes through all {config.n_routed_experts} experts, of which {config.num_experts_per_tok} "
            "count: a graph cannot gather as many rows for an expert as there happen to be"
        )
    if config.num_nextn_predict_layers:
        notes.append("without the multi-token-prediction modules: a graph has no drafting")
    return notes


def dynamic_sizes() -> tuple[dict[int, Any], ...]:
    """Which sizes of the decoder's arguments are known when the graph runs only: batch, new tokens, tokens before."""
    free = torch.export.Dim.DYNAMIC
    return ({0: free, 1: free}, {0: free, 1: free}, {1: free, 2: free})


def example(config: ModelConfig, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of any sizes but 0 and 1, which torch.export takes for constants."""
    old, new = 3, 5
    ids = torch.arange(batch * new).view(batch, new) % config.vocab_size
    past = torch.zeros(num_caches(config), batch, old, cache_width(config))
    return ids, torch.ones(batch, old + new, dtype=torch.long), past


@contextlib.contextmanager
def quiet(package: str) -> Iterator[None]:
    """Keep a converter's own report off the terminal: its steps, its bars, the packages that it has no use for."""
    logger = logging.getLogger(package)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
