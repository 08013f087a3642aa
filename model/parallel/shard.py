"""How each parameter is cut over tensor- and expert-parallel ranks, by name; and how a model part is built cut.

The layers themselves know only an `Axis` each (`tp`, `sp`, `ep`), which `attach_axes` sets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.init import initial_weight
from model.layers.rope import rotary_table
from model.parallel.mesh import Mesh
from model.transformer import Transformer


@dataclass(frozen=True)
class Shard:
    """How one parameter is cut.

    Attributes:
        tp_dim: the dimension cut over tensor-parallel ranks; None for one that every rank holds whole.
        expert: dimension 0, the experts, is cut over expert-parallel ranks.
        gated: along tp_dim lie gate rows, then up rows; each half is cut by itself.
    """

    tp_dim: int | None = None
    expert: bool = False
    gated: bool = False


# Heads, inner features and vocabulary entries are cut; what every rank needs whole (latents, norms, router) is not.
_PLAN = (
    (re.compile(r"experts\.gate_up_proj$"), Shard(1, expert=True, gated=True)),
    (re.compile(r"experts\.down_proj$"), Shard(2, expert=True)),
    (re.compile(r"([qkv]_proj|q_b_proj|kv_b_proj|gate_proj|up_proj|embed_tokens|lm_head)\.weight$"), Shard(0)),
    (re.compile(r"(o_proj|down_proj)\.weight$"), Shard(1)),
)
_WHOLE = Shard()


def shard_of(name: str) -> Shard:
    """How the parameter `name` is cut."""
    return next((shard for pattern, shard in _PLAN if pattern.search(name)), _WHOLE)


def cut(full: Tensor, shard: Shard, *, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1)) -> Tensor:
    """The part of a whole parameter that one rank holds.

    Args:
        tp, ep: (index, size) of the rank along each axis.
    """
    if shard.expert:
        full = full.chunk(ep[1], 0)[ep[0]]
    if shard.tp_dim is None or tp[1] == 1:
        return full
    if not shard.gated:
        return full.chunk(tp[1], shard.tp_dim)[tp[0]]
    halves = (half.chunk(tp[1], shard.tp_dim)[tp[0]] for half in full.chunk(2, shard.tp_dim))
    return torch.cat(list(halves), shard.tp_dim)


def join_tp(parts: list[Tensor], shard: Shard) -> Tensor:
    """Inverse of the cut over tensor-parallel ranks, parts in rank order."""
    assert shard.tp_dim is not None
    if not shard.gated:
        return torch.cat(parts, shard.tp_dim)
    gates, ups = zip(*(part.chunk(2, shard.tp_dim) for part in parts), strict=True)
    return torch.cat([*gates, *ups], shard.tp_dim)


def attach_axes(model: nn.Module, mesh: Mesh) -> None:
    """Give every layer that splits work the axes it splits it over."""
    for module in model.modules():
        for name in ("tp", "sp", "ep"):
            if hasattr(module, name):
                setattr(module, name, mesh.axis(name))


def build_part(
    config: ModelConfig, layers: range, mesh: Mesh, *, seed: int = 0, initial: dict[str, Tensor] | None = None
) -> Transformer:
    """One pipeline stage with this rank's slice of every parameter, on the CPU.

    No whole model is ever in memory: parameters are made one by one, whole, and cut.

    Args:
        initial: whole parameters by name; else weights are drawn from the seed.
    """
    with torch.device("meta"):
        part = Transformer(config, layers)
    tp, ep = ((axis.index, axis.size) for axis in (mesh.axis("tp"), mesh.axis("ep")))
    for name, meta in list(part.named_parameters()):
        full = initial[name] if initial is not None else initial_weight(name, meta.shape, config, seed)
        _replace(part, name, nn.Parameter(cut(full, shard_of(name), tp=tp, ep=ep).detach().clone()))
    for name, buffer in list(part.named_buffers()):
        stored = None if initial is None else initial.get(name)
        fresh = torch.zeros(buffer.shape, dtype=buffer.dtype)
        _replace(part, name, fresh if stored is None else stored.detach().clone())
    part.rotary = rotary_table(config)
    attach_axes(part, mesh)
    return part


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    table: dict[str, Any] = module._parameters if isinstance(value, nn.Parameter) else module._buffers
    assert last in table
    table[last] = value
