"""How far the trainer's log-probabilities are from those the answers were sampled with: two programs, one policy."""

from __future__ import annotations

import torch
from torch import Tensor

from model.parallel.mesh import Mesh
from ray_pipeline.engine.gather import all_ranks_gather

FAR = 1e-3  # nats; rounding alone stays well below


class SamplerGap:
    """Collects what an objective sees of a step on this rank, until it is asked for the figures of all ranks."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # tokens, |d|, tokens with |d| > FAR, k3
        self._largest: Tensor | None = None

    def observe(self, difference: Tensor, trained: Tensor) -> None:
        """Take the differences, trainer's less sampler's, of the tokens that are trained: both of one shape."""
        d = difference.detach().float()[trained > 0]
        if not d.numel():
            return
        size = d.abs()
        sums = torch.stack([torch.ones_like(d), size, (size > FAR).float(), d.exp() - d - 1]).double().sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        largest = size.max()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def figures(self, mesh: Mesh) -> dict[str, float]:
        """Over all ranks since the last time: mean and largest |difference|, share of tokens that differ by more than
        1e-3, and the k3 estimate of KL(sampler || trainer), in nats. A message between ranks; none before a step."""
        mine = None if self._sums is None or self._largest is None else (self._sums.tolist(), float(self._largest))
        self._sums = self._largest = None
        found = [part for part in all_ranks_gather(mesh, mine) if part is not None]
        if not found:
            return {}
        count, total, far, kl = (sum(column) for column in zip(*(sums for sums, _ in found), strict=True))
        return {
            "sampler_gap": total / count,
            "sampler_gap_max": max(largest for _, largest in found),
            "sampler_gap_far": far / count,
            "sampler_kl": kl / count,
        }
