"""How far the trainer's log-probabilities are from those the answers were sampled with, and the weights that make up
for it: the sampler is another program, and its weights may be older."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.parallel.collectives import Axis
from model.parallel.gather import all_ranks_gather
from model.parallel.mesh import Mesh
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.objectives.documents import of_each_token, sum_documents

FAR = 1e-3  # nats; rounding alone stays well below
CorrectionMode = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class Correction:
    """Importance weights of sampled tokens: the trainer's probability over the sampler's, held within bounds.

    Attributes:
        mode: of tokens or of whole answers (the product over their tokens), which, outside the bounds, are truncated to
            the bound or masked to 0. token_truncate is TIS (https://fengyao.notion.site/off-policy-rl), token_mask
            IcePop (arXiv:2510.18855), sequence_mask the default of TRL.
        low, high: the bounds; None for none.
    """

    mode: CorrectionMode = "sequence_mask"
    low: float | None = None
    high: float | None = 3.0

    @property
    def by_answer(self) -> bool:
        """Whether an answer has one weight."""
        return self.mode.startswith("sequence")

    def weights(self, difference: Tensor, batch: Batch, sp: Axis) -> tuple[Tensor, Tensor]:
        """Weights and where they are outside the bounds (bool), both [rows, seq / sp].

        Args:
            difference: the trainer's log-probabilities less the sampler's, zero where nothing is trained.
        """
        if self.by_answer:
            difference = of_each_token(sum_documents(difference, batch, sp), batch)
        ratio = difference.exp()
        outside = torch.zeros_like(ratio, dtype=torch.bool)
        if self.low is not None:
            outside |= ratio < self.low
        if self.high is not None:
            outside |= ratio > self.high
        masked = self.mode.endswith("mask")
        return ratio.masked_fill(outside, 0.0) if masked else ratio.clamp(self.low, self.high), outside


class SamplerGap:
    """Collects what an objective sees of a step on this rank, until it is asked for the figures of all ranks."""

    def __init__(self) -> None:
        # Tokens, |d|, tokens with |d| > FAR, k3; then of the weights: their number, w, w squared, those out of bounds.
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    def observe(self, difference: Tensor, trained: Tensor, corrected: Tensor | None = None) -> None:
        """Take what concerns the trained tokens.

        Args:
            difference: the trainer's log-probabilities less the sampler's. trained: > 0 for tokens that are trained.
            corrected: [3, *difference.shape]: for each token the share of a weight that it stands for (1, or of an
                answer's weight one over its tokens), the weight, and 1 where it is out of bounds. None without weights.
        """
        chosen = trained > 0
        d = difference.detach().float()[chosen]
        if not d.numel():
            return
        size = d.abs()
        sums = torch.stack([torch.ones_like(d), size, (size > FAR).float(), d.exp() - d - 1]).double().sum(1)
        weighted = sums.new_zeros(4)
        if corrected is not None:
            share, weight, outside = corrected.detach().double()[:, chosen]
            weighted = torch.stack([share, share * weight, share * weight.square(), share * outside]).sum(1)
        sums = torch.cat([sums, weighted])
        self._sums = sums if self._sums is None else self._sums + sums
        largest = size.max()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def figures(self, mesh: Mesh) -> dict[str, float]:
        """Over all ranks since the last time. A message between ranks; nothing before a step.

        Mean and largest |difference|, share of tokens that differ by more than 1e-3, the k3 estimate of
        KL(sampler || trainer), in nats. With weights: the effective sample size (sum of weights)^2 / sum of squares, as
        a share of their number; their mean; the share of them that is out of bounds.
        """
        mine = None if self._sums is None or self._largest is None else (self._sums.tolist(), float(self._largest))
        self._sums = self._largest = None
        found = [part for part in all_ranks_gather(mesh, mine) if part is not None]
        if not found:
            return {}
        sums = [sum(column) for column in zip(*(sums for sums, _ in found), strict=True)]
        count, total, far, kl, number, weight, squares, outside = sums
        gap = {
            "sampler_gap": total / count,
            "sampler_gap_max": max(largest for _, largest in found),
            "sampler_gap_far": far / count,
            "sampler_kl": kl / count,
        }
        if not number:
            return gap
        return gap | {
            "effective_sample_size": weight**2 / (number * squares) if squares else 0.0,
            "correction_mean": weight / number,
            "correction_outside": outside / number,
        }
