"""How each parameter is cut over tensor- and expert-parallel ranks, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


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
    (re.compile(r"value_embedding\.table$"), Shard(1)),
    (re.compile(r"value_embedding\.gate$"), Shard(0)),
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
