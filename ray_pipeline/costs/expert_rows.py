"""Tokens on their way to experts and back, in rows and bytes: what `model.moe.dispatch` sends, and keeps of it.

Routing is taken to be even: every choice of experts that the router allows is as frequent as any other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from model.config import ModelConfig
from ray_pipeline.costs.workload import FP32, Workload

TILE = 128  # values with a scale of their own, as in `model.layers.fp8`
_EXPERT, INDEX = 4, 8  # bytes of an expert's number on its way, and of a row's


@dataclass(frozen=True)
class Hop:
    """One of the exchanges that a layer's tokens go through.

    Attributes:
        axis: as messages name it. ranks: that take part. tokens: that a rank sends. rows: that they are, as each goes
            once to every rank that needs it; also what it receives. most: rows of one token. width: experts that a row
            names.
    """

    axis: str
    ranks: int
    tokens: float
    rows: float
    most: int
    width: int

    def sent(self, work: Workload) -> tuple[float, float]:
        """Bytes to other ranks: forward, backward."""
        away, rows = self.rows * (1 - 1 / self.ranks), _there(work) + work.model.hidden_size * work.element
        return away * (rows + self.width * (_EXPERT + FP32)), away * (rows + self.width * FP32)

    def sent_again(self, work: Workload) -> float:
        """Bytes to other ranks if its rows come once more."""
        return self.rows * (1 - 1 / self.ranks) * _there(work)

    def arrived_bytes(self, work: Workload, *, rows: bool) -> float:
        """What came over it: experts and weights, and where that is asked for the rows themselves."""
        return self.rows * (_there(work) * rows + self.width * (_EXPERT + FP32))

    def route_bytes(self) -> float:
        """What backward has to know of the way: each token's rows, each row's token, the order of its experts."""
        return self.tokens * self.most * (INDEX + 1) + self.rows * (INDEX + self.width * (INDEX + 1))


def _there(work: Workload) -> int:
    """Bytes of one row on its way to experts, or of the gradient of what comes back."""
    hidden = work.model.hidden_size
    return hidden + FP32 * -(-hidden // TILE) if work.fp8_dispatch else hidden * work.element


def hops(work: Workload) -> list[Hop]:
    """Between nodes and within one, where there are several ranks to go to."""
    model, layout = work.model, work.layout
    near, far = layout.dispatch_sizes(work.node)
    tokens, chosen, experts = work.tokens_at_once / layout.tp, model.num_experts_per_tok, model.n_routed_experts
    found = []
    if far > 1:
        rows = tokens * reached(model, far)
        found.append(Hop("ep, nodes", far, tokens, rows, min(far, chosen), min(chosen, experts // far)))
        tokens = rows
    if near > 1:
        rows = work.tokens_at_once * reached(model, layout.ep)  # every tensor-parallel rank of a place gets it
        most = min(near, min(chosen, experts // far) * layout.tp)
        found.append(Hop("ep", near, tokens, rows, most, min(chosen, experts // layout.ep)))
    return found


def reached(model: ModelConfig, places: int) -> float:
    """Of so many places that experts are shared out among in order, those that hold one of a token's, on average."""
    limited = model.n_group > 1 and model.topk_method != "greedy"
    groups, allowed = (model.n_group, model.topk_group) if limited else (1, 1)
    return _reached(model.n_routed_experts, model.num_experts_per_tok, groups, allowed, places)


@lru_cache(maxsize=1024)
def _reached(experts: int, chosen: int, groups: int, allowed: int, places: int) -> float:
    """Of every place the probability that, `allowed` of `groups` being drawn and then `chosen` of their experts, one
    of those is there."""
    each, group = experts // places, experts // groups
    total = 0.0
    for start in range(0, experts, each):
        shared = [min(start + each, g + group) - max(start, g) for g in range(0, experts, group)]
        shared = [size for size in shared if size > 0]
        drawn = Counter({(0, 0): 1})  # groups of this place that are allowed, experts of it in them -> ways
        for size in shared:
            drawn += Counter({(count + 1, held + size): ways for (count, held), ways in drawn.items()})
        for (count, held), ways in drawn.items():
            if count <= allowed:
                ways *= comb(groups - len(shared), allowed - count)
                missed = comb(allowed * group - held, chosen) / comb(allowed * group, chosen)
                total += ways / comb(groups, allowed) * (1 - missed)
    return total
