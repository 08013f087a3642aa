"""What is reported of an optimizer step: sums of every rank's micro-batches, known to all ranks in two messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from model.layers.auxiliary import LOSSES, LayerLosses
from model.parallel.collectives import all_reduce
from model.parallel.mesh import Mesh
from ray_pipeline.engine.expert_balance import ExpertBalance


@dataclass(frozen=True)
class StepStats:
    """One optimizer step as every rank knows it.

    Attributes:
        loss: mean. grad_norm: before clipping. metrics: sums of the objective's, to be divided by `weight`.
        figures: losses of single layers (means per token and layer), and how evenly experts were used.
        tokens: of the global batch, without padding.
    """

    loss: float
    grad_norm: float
    weight: float
    metrics: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def means(self) -> dict[str, float]:
        """The metrics divided by `weight`; those of a section that counts tokens of its own, as `mtp/tokens`, by these,
        and left out where there are none."""
        own = {name.removesuffix("/tokens"): count for name, count in self.metrics.items() if name.endswith("/tokens")}
        means = {}
        for name, value in self.metrics.items():
            count = own.get(name.rpartition("/")[0], self.weight)
            if count and not name.endswith("/tokens"):
                means[name] = value / count
        return means


def objective_sums(values: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """What an objective returned for this rank's micro-batches, [width] each (none without the last part), added up."""
    total = torch.zeros(width, dtype=torch.float64, device=device)
    for one in values:
        total += one
    return total


def over_ranks(mesh: Mesh, partial: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two vectors added up over all ranks: each replica has a part of `partial`, all of them have the same `shared`."""
    shared = partial.new_zeros(0) if shared is None else shared
    both = mesh.all_reduce(torch.cat([mesh.all_reduce(partial, "replica"), shared.to(partial)]), "pp")
    return both[: len(partial)], both[len(partial) :]


@torch.no_grad()
def largest_of(groups: Sequence[Iterable[Tensor]], mesh: Mesh, device: torch.device) -> tuple[float, ...]:
    """The largest number of each group of tensors over all ranks, without signs; inf where one is not finite."""
    here = []
    for group in groups:
        norms = [torch.linalg.vector_norm(t.detach(), math.inf).float().to(device) for t in group if t.numel()]
        here.append(torch.stack(norms).max() if norms else torch.zeros((), device=device))
    found = torch.stack(here).nan_to_num(nan=math.inf, posinf=math.inf)  # max keeps a NaN; a reduction may not
    for axis in ("replica", "model"):
        all_reduce(found, mesh.axis(axis), dist.ReduceOp.MAX)
    return tuple(found.tolist())


def layer_figures(auxiliary: list[float], measured: list[list[float]], experts: ExpertBalance) -> dict[str, float]:
    """Losses of single layers as means per token and layer, and how evenly experts were used.

    Args:
        auxiliary: sum and count of each of `LOSSES` over all ranks. measured: `ExpertBalance.measured`, likewise.
    """
    pairs = zip(LOSSES, auxiliary[::2], auxiliary[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count} | experts.figures(measured)


def auxiliary_sums(losses: LayerLosses, device: torch.device) -> Tensor:
    """Sum and count of each of `LOSSES` on this rank, one after another: fp64 [2 * len(LOSSES)]."""
    return torch.tensor([losses.pair(name) for name in LOSSES], dtype=torch.float64, device=device).flatten()
