"""A model as a Hugging Face folder: config, safetensors, tokenizer, generation config, model card.

transformers, vLLM and llama.cpp's converter read what `save_hf` writes. Needs none of them itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.convert.names import from_published, to_published
from model.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What this code does not do: other values would load and be silently wrong.
_REQUIRED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "moe_layer_freq": 1,
    "quantization_config": None,
}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """config.json of a DeepSeek-V3 model -> ModelConfig; absent keys take DeepSeek's meaning.

    Raises:
        ValueError: naming the first key this code cannot honour.
    """
    for key, required in _REQUIRED.items():
        if values.get(key, required) != required:
            raise ValueError(f"config.json: {key}={values[key]!r} is not supported, only {required!r}")
    published = {f.name for f in dataclasses.fields(ModelConfig) if f.metadata.get("hf", True)}
    known = published - {"rope_scaling", "rope_theta", "num_key_value_heads"}
    kept = {key: values[key] for key in known if key in values}
    kept["n_shared_experts"] = values.get("n_shared_experts") or 0
    kept["num_nextn_predict_layers"] = values.get("num_nextn_predict_layers") or 0
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    kept["rope_theta"] = float(values.get("rope_theta", rope.get("rope_theta", 10000.0)))
    if scaling is not None:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind != "yarn":
            raise ValueError(f"config.json: rope_scaling of type {kind!r} is not supported, only 'yarn'")
        # Without `mscale_all_dim` DeepSeek leaves the softmax scale alone; 0 means the same.
        defaults = {"mscale": 1.0, "mscale_all_dim": 0.0}
        names = {f.name for f in dataclasses.fields(RopeScaling)}
        kept["rope_scaling"] = RopeScaling(**{k: v for k, v in (defaults | scaling).items() if k in names})
    config = ModelConfig(**kept)
    config.validate()
    return config


def special_token_ids(tokenizer_folder: Path) -> dict[str, int]:
    """`{bos,eos,pad}_token_id` of a tokenizer folder, those it has."""
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    out = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        content = token["content"] if isinstance(token, dict) else token
        if content is not None:
            out[f"{name}_token_id"] = ids[content]
    return out


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses files without this key
    except SafetensorError as error:  # it hides a full disk in its text: "... (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
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
        _save(tensors, folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The balancing bias moves in steps of a thousandth: DeepSeek keeps it in fp32.
    # Copies: safetensors refuses shared memory.
    kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    return tensor.detach().to("cpu", kind, copy=True).contiguous()


def save_hf(
    folder: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    *,
    tokenizer_folder: Path,
    model_card: str,
    dtype: torch.dtype = torch.float32,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Fill `folder`, which the caller makes, and moves into place when this returns.

    Args:
        state: Transformer state dict, MTP modules included.
        tokenizer_folder: its tokenizer files and chat template are copied.
        model_card: README.md.
        generation: more keys for generation_config.json, such as temperature.
    """
    ids = special_token_ids(tokenizer_folder)
    name = str(dtype).removeprefix("torch.")
    # Two spellings: `dtype` is read by transformers 5, `torch_dtype` by everything older.
    _write_json(folder / "config.json", config.to_hf() | ids | {"dtype": name, "torch_dtype": name, "use_cache": True})
    _write_json(folder / "generation_config.json", ids | (generation or {}))
    for file in TOKENIZER_FILES:
        if (tokenizer_folder / file).exists():
            shutil.copyfile(tokenizer_folder / file, folder / file)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The tokenizer does not know which model it is for; here it does.
    _write_json(folder / "tokenizer_config.json", settings | {"model_max_length": config.max_position_embeddings})
    (folder / "README.md").write_text(model_card, encoding="utf-8")
    published = to_published(config, state)
    _write_weights(folder, {k: _stored(k, v, dtype) for k, v in published.items()}, max_shard_bytes)


def load_hf(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and Transformer state dict of a Hugging Face DeepSeek-V3 folder.

    MTP modules the folder announces but does not hold are dropped from the config, as Hugging Face's own saves do not
    keep them.

    Raises:
        ValueError: for a config this code cannot honour, or tensors that are missing, unknown or of the wrong shape.
    """
    config = config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (not a dict)
                tensors[key] = stored.get_tensor(key).to(dtype)
    if not any(key.startswith(f"model.layers.{config.num_hidden_layers}.") for key in tensors):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    state = from_published(config, tensors)
    _check_shapes(folder, config, state)
    return config, state


def _check_shapes(folder: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{folder}: {problems[0]}{more}")
