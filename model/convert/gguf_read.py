"""A GGUF file read back: config and weights, dequantised, as our model has them. The `gguf` package reads the file.

Only architectures that `gguf_tensors` writes are read: this project's files, and those of llama.cpp's converter for the
same models in absorbed form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.convert.folder import Selection
from model.convert.gguf_tensors import gguf_tensors
from model.convert.hf_load import MOST_EXPERTS
from model.convert.names import published_slots
from model.convert.selected import Selected, select
from model.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = ("deepseek2", "deepseek32")
_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "v_head_dim": "attention.value_length_mla",
    "qk_rope_head_dim": "rope.dimension_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
}
_INDEXER_KEYS = {
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
}
_GATES: dict[int, Literal["softmax", "sigmoid"]] = {1: "softmax", 2: "sigmoid"}
_ABSENT = object()


def gguf_fields(reader: GGUFReader) -> dict[str, Any]:
    """A file's metadata, by key."""
    return {name: field.contents() for name, field in reader.fields.items()}


def read_gguf(
    path: Path,
    selection: Selection | None = None,
    *,
    seed: int = 0,
    opened: tuple[GGUFReader, dict[str, Any]] | None = None,
) -> tuple[ModelConfig, Selected]:
    """Config, and the whole state dict in fp32; tensors that are not taken are drawn from the seed as for a new model.

    Args:
        selection: patterns of published names.
        opened: the file and its `gguf_fields`, where they were read before.
    Raises:
        ValueError: another architecture, a key or tensor that is missing, of another shape, or of a kind that cannot be
            read.
    """
    if opened is None:
        from gguf import GGUFReader

        opened = (reader := GGUFReader(path)), gguf_fields(reader)
    reader, fields = opened
    config = gguf_config(path, fields)
    experts = config.num_hidden_layers * config.n_routed_experts
    if config.num_hidden_layers > len(reader.tensors) or experts > MOST_EXPERTS:
        raise ValueError(
            f"{path}: its keys ask for {config.num_hidden_layers} layers with {config.n_routed_experts} experts each, "
            f"but it holds {len(reader.tensors)} tensors"
        )
    shapes = _shapes(config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    _check_tensors(path, gguf_tensors(config, meta), reader)
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    held = _fill(path, gguf_tensors(config, state), reader)
    places = published_in_gguf(config)
    partial = {name for target, names in places.items() if target not in held for name in names}
    published = {name for names in places.values() for name in names} - partial  # some lie in two tensors
    try:
        return config, select(config, state, selection or Selection(), published, seed=seed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def gguf_config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    """The architecture that a file's metadata describes. What only training needs has its default.

    Raises:
        ValueError: another architecture, or a key that is missing or of another kind.
    """
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {str(architecture)[:40]!r} is not read, only {known}")

    def value(key: str, default: Any = _ABSENT) -> Any:
        found = fields.get(f"{architecture}.{key}", default)
        if found is _ABSENT:
            raise ValueError(f"{path}: the key {architecture}.{key} is missing")
        return found

    try:
        gate = int(value("expert_gating_func", 1))
        if gate not in _GATES:
            raise ValueError(f"{path}: expert_gating_func={gate} is not read, only {', '.join(map(str, _GATES))}")
        groups = int(value("expert_group_count", 1))
        mtp = int(value("nextn_predict_layers", 0))
        low_rank = value("attention.q_lora_rank", None)
        sparse = architecture == "deepseek32"
        keys = _KEYS | (_INDEXER_KEYS if sparse else {})
        values: dict[str, Any] = {ours: int(value(theirs)) for ours, theirs in keys.items()}
        config = ModelConfig(
            **values,
            attention="dsa" if sparse else "mla",
            vocab_size=len(fields.get("tokenizer.ggml.tokens", ())) or int(value("vocab_size")),
            num_hidden_layers=int(value("block_count")) - mtp,
            num_nextn_predict_layers=mtp,
            rms_norm_eps=_exact(value("attention.layer_norm_rms_epsilon")),
            rope_theta=_exact(value("rope.freq_base")),
            q_lora_rank=None if low_rank is None else int(low_rank),
            qk_nope_head_dim=int(value("attention.key_length_mla")) - int(value("rope.dimension_count")),
            routed_scaling_factor=_exact(value("expert_weights_scale", 1.0)),
            norm_topk_prob=bool(value("expert_weights_norm", False)),
            scoring_func=_GATES[gate],
            topk_method="noaux_tc" if _GATES[gate] == "sigmoid" else "greedy",
            n_group=groups,
            topk_group=int(value("expert_group_used_count", groups)),
            rope_scaling=_scaling(f"{architecture}.rope.scaling.", fields),
        )
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: a key of {architecture} is of another kind than it should be ({error})") from None
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _exact(number: Any) -> float:
    """The decimal that a float32 stands for: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(number)))


def _scaling(prefix: str, fields: dict[str, Any]) -> RopeScaling | None:
    kind = fields.get(f"{prefix}type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise ValueError(f"rope scaling of type {str(kind)[:40]!r} is not read, only 'yarn'")
    # The file has 0.1 * mscale_all_dim, rounded to float32, which is good for seven digits.
    scale = float(f"{float(fields.get(f'{prefix}yarn_log_multiplier', 0.1)) / 0.1:.6g}")
    return RopeScaling(
        factor=_exact(fields[f"{prefix}factor"]),
        original_max_position_embeddings=int(fields[f"{prefix}original_context_length"]),
        beta_fast=_exact(fields.get(f"{prefix}yarn_beta_fast", 32.0)),
        beta_slow=_exact(fields.get(f"{prefix}yarn_beta_slow", 1.0)),
        mscale=scale,
        mscale_all_dim=scale,
    )


def _check_tensors(path: Path, places: dict[str, Tensor], reader: GGUFReader) -> None:
    """Hold names and shapes against the model that the keys describe, before memory for it is taken."""
    unknown = sorted({tensor.name for tensor in reader.tensors} - places.keys())
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors are not part of the model, for example {unknown[0]}")
    for tensor in reader.tensors:
        shape, asked = [int(size) for size in reversed(tensor.shape.tolist())], list(places[tensor.name].shape)
        if shape != asked:
            raise ValueError(f"{path}: {tensor.name} has shape {shape}, its keys ask for {asked}")


def _fill(path: Path, places: dict[str, Tensor], reader: GGUFReader) -> set[str]:
    """Copy what the file holds into views of the parameters; returns the names it holds."""
    from gguf import quants

    held = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in held.items():
        place, shape = places[name], list(places[name].shape)
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{path}: {name} is of kind {tensor.tensor_type.name}, which is not read") from None
        if values.size != math.prod(shape):
            raise ValueError(f"{path}: {name} holds {values.size} numbers, its shape {shape} asks for others")
        found = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
        if not bool(found.isfinite().all()):
            raise ValueError(f"{path}: {name} holds a number that is not finite")
        place.copy_(found)
    return set(held)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def published_in_gguf(config: ModelConfig) -> dict[str, set[str]]:
    """Name in the file -> published names of what it holds; what the file has no place for is in none.

    Found by writing numbers in place of weights, one for each published tensor, through `gguf_tensors`.
    """
    shapes = _shapes(config)
    slots = {name: slot for name, slot in published_slots(config, shapes).items() if not slot.shared}
    names = list(slots)
    numbers = {
        name: torch.empty(shape if len(shape) == 1 else (*shape[:-1], 1), dtype=torch.int32)
        for name, shape in shapes.items()
    }
    for number, slot in enumerate(slots.values()):
        slot.view(numbers[slot.name]).fill_(number)
    marked = {name: tensor.expand(shapes[name]) for name, tensor in numbers.items()}
    return {
        target: {names[i] for i in found.unique().tolist()} for target, found in gguf_tensors(config, marked).items()
    }
