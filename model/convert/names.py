"""Parameter names: ours <-> the ones DeepSeek publishes, one tensor per expert. Pure functions of state dicts."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from model.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*\bmlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_MTP_OWN = {"shared_head_norm.weight": "shared_head.norm.weight"}
_MTP_TOP = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head_norm.weight")
# Each MTP layer on disk repeats the embedding and the head it shares with the model (DeepSeek-V3's README_WEIGHTS).
_MTP_SHARED = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def _published_name(config: ModelConfig, name: str) -> str:
    if name.startswith("mtp."):
        _, depth, rest = name.split(".", 2)
        rest = _MTP_OWN.get(rest, rest.removeprefix("block."))
        return f"model.layers.{config.num_hidden_layers + int(depth)}.{rest}"
    return name if name == "lm_head.weight" else f"model.{name}"


def to_published(config: ModelConfig, state: dict[str, Tensor], *, mtp: bool = True) -> dict[str, Tensor]:
    """Transformer state dict -> published names; experts unstacked.

    MTP modules become layers behind the last, as vLLM's deepseek_mtp reads them.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("mtp.") and not mtp:
            continue
        target = _published_name(config, name)
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = target.removesuffix(".gate_up_proj")
            for e, (gate, up) in enumerate(zip(*tensor.chunk(2, 1), strict=True)):
                out[f"{prefix}.{e}.gate_proj.weight"], out[f"{prefix}.{e}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = target.removesuffix(".down_proj")
            out |= {f"{prefix}.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            out[target] = tensor
    for depth in range(config.num_nextn_predict_layers if mtp else 0):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        out |= {prefix + theirs: state[ours] for theirs, ours in _MTP_SHARED.items()}
    return out


def _our_name(config: ModelConfig, name: str) -> str | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.removeprefix("model.")
    depth = int(match[1]) - config.num_hidden_layers
    if depth < 0:
        return f"layers.{match[1]}.{match[2]}"
    if match[2] in _MTP_SHARED:
        return None
    rest = next((ours for ours, theirs in _MTP_OWN.items() if theirs == match[2]), match[2])
    return f"mtp.{depth}.{rest if rest in _MTP_TOP else 'block.' + rest}"


def from_published(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> Transformer state dict. MTP layers beyond `num_nextn_predict_layers` are left out.

    Raises:
        ValueError: naming an expert that is missing.
    """
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        ours = _our_name(config, name)
        if ours is None or (layer is not None and int(layer[1]) >= last):
            continue
        match = _EXPERT.fullmatch(ours)
        if match is None:
            out[ours] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for prefix, parts in experts.items():
        numbers = range(config.n_routed_experts)
        missing = [(e, kind) for e in numbers for kind in ("gate", "up", "down") if (e, kind) not in parts]
        if missing:
            raise ValueError(
                f"{prefix}.{missing[0][0]}.{missing[0][1]}_proj.weight is missing ({len(missing)} expert tensors)"
            )
        out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([parts[e, "gate"], parts[e, "up"]]) for e in numbers])
        out[f"{prefix}.down_proj"] = torch.stack([parts[e, "down"] for e in numbers])
    return out
