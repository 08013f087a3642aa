"""Parameter names: ours <-> the ones DeepSeek publishes, one tensor per expert. Pure functions of names and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from model.config import ModelConfig

_MTP_OWN = {"shared_head_norm.weight": "shared_head.norm.weight"}
# Each MTP layer on disk repeats the embedding and the head it shares with the model (DeepSeek-V3's README_WEIGHTS).
_MTP_SHARED = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


@dataclass(frozen=True)
class Slot:
    """Where a published tensor lies in a Transformer's state dict.

    Attributes:
        name: of the parameter. expert, part: of the stacked experts, which one and which of its three matrices.
        shared: a repetition of a tensor that has its own name; written, but not needed when read.
    """

    name: str
    expert: int | None = None
    part: Literal["gate", "up", "down"] | None = None
    shared: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The published tensor inside the whole parameter."""
        if self.expert is None:
            return parameter
        own = parameter[self.expert]
        if self.part == "down":
            return own
        gate, up = own.chunk(2, 0)
        return gate if self.part == "gate" else up


def published_name(config: ModelConfig, name: str) -> str:
    """Where a tensor that belongs to no expert is published."""
    if name.startswith("mtp."):
        _, depth, rest = name.split(".", 2)
        rest = _MTP_OWN.get(rest, rest.removeprefix("block."))
        return f"model.layers.{config.num_hidden_layers + int(depth)}.{rest}"
    return name if name == "lm_head.weight" else f"model.{name}"


def published_slots(config: ModelConfig, names: Iterable[str], *, mtp: bool = True) -> dict[str, Slot]:
    """Published name -> slot, for the names of a Transformer's state dict.

    MTP modules become layers behind the last, as vLLM's deepseek_mtp reads them.
    """
    out: dict[str, Slot] = {}
    for name in names:
        if name.startswith("mtp.") and not mtp:
            continue
        target = published_name(config, name)
        prefix, _, last = target.rpartition(".")
        if not prefix.endswith("mlp.experts"):
            out[target] = Slot(name)
            continue
        for e in range(config.n_routed_experts):
            if last == "down_proj":
                out[f"{prefix}.{e}.down_proj.weight"] = Slot(name, e, "down")
            else:
                out[f"{prefix}.{e}.gate_proj.weight"] = Slot(name, e, "gate")
                out[f"{prefix}.{e}.up_proj.weight"] = Slot(name, e, "up")
    for depth in range(config.num_nextn_predict_layers if mtp else 0):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        out |= {prefix + theirs: Slot(ours, shared=True) for theirs, ours in _MTP_SHARED.items()}
    return out


def to_published(config: ModelConfig, state: Mapping[str, Tensor], *, mtp: bool = True) -> dict[str, Tensor]:
    """Transformer state dict -> published names; experts unstacked."""
    slots = published_slots(config, state, mtp=mtp)
    return {name: slot.view(state[slot.name]) for name, slot in slots.items()}
