"""A model as a Hugging Face folder: config, safetensors, tokenizer, generation config, model card.

transformers, vLLM and llama.cpp's converter read what `save_hf` writes. Needs none of them itself. `hf_load` reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.convert.fp8_blocks import QUANTISATION, in_blocks
from model.convert.hf_config import published_family, special_token_ids, to_hf
from model.convert.names import to_published

MAX_SHARD_BYTES = 5_000_000_000  # as published checkpoints
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file.

    Raises:
        OSError: a full disk or no right to write, which safetensors hides in the text of an error of its own.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses files without this key
    except SafetensorError as error:  # "... (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """model.safetensors, or shards with an index above `max_shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        save_tensors(tensors, folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_tensors(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is written: on the CPU, in memory of its own, because safetensors refuses shared memory."""
    # The balancing bias moves in steps of a thousandth: DeepSeek keeps it in fp32.
    kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    return tensor.detach().to("cpu", kind, copy=True).contiguous()


def copy_tokenizer(tokenizer_folder: Path, folder: Path, config: ModelConfig) -> None:
    """Tokenizer files and chat template; the tokenizer does not know which model it is for, here it does."""
    for file in TOKENIZER_FILES:
        if (tokenizer_folder / file).exists():
            shutil.copyfile(tokenizer_folder / file, folder / file)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", settings | {"model_max_length": config.max_position_embeddings})


def save_hf(
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
    """Fill `folder`, which the caller makes, and moves into place when this returns.

    MTP modules are written for the architectures whose checkpoints carry them: not for V2.

    Args:
        state: Transformer state dict, MTP modules included.
        dtype: float8_e4m3fn writes blocks as DeepSeek publishes them (`fp8_blocks`).
        tokenizer_folder: its tokenizer files and chat template are copied.
        model_card: README.md.
        generation: more keys for generation_config.json, such as temperature.
        max_shard_bytes: of one weight file; a tensor that is larger has one of its own.
    Raises:
        ValueError: no published class has this architecture.
    """
    values, family = to_hf(config), published_family(config)
    assert family is not None
    ids = special_token_ids(tokenizer_folder)
    blocks = dtype == torch.float8_e4m3fn
    name = "bfloat16" if blocks else str(dtype).removeprefix("torch.")
    quantised = {"quantization_config": QUANTISATION} if blocks else {}
    # Two spellings: `dtype` is read by transformers 5, `torch_dtype` by everything older.
    kinds = {"dtype": name, "torch_dtype": name, "use_cache": True}
    _write_json(folder / "config.json", values | ids | kinds | quantised)
    _write_json(folder / "generation_config.json", ids | (generation or {}))
    copy_tokenizer(tokenizer_folder, folder, config)
    (folder / "README.md").write_text(model_card, encoding="utf-8")
    published = to_published(config, state, mtp=family.mtp)
    tensors: dict[str, Tensor] = {}
    for key, value in published.items():
        tensors |= in_blocks(key, value) if blocks else {key: stored(key, value, dtype)}
    write_weights(folder, tensors, max_shard_bytes)
