"""Routed experts all at once, in torch's grouped kernel; in fp32, which it does not take, one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu.expert_loop import OneByOne
from model.kernels.expert_node import feed_forward
from model.kernels.rows import Plan
from model.kernels.weight_gradients import BackwardSplit


class AllAtOnce:
    """The rows of all experts.

    Args:
        counts: [experts] rows of each one.
    """

    writes_into = False

    def __init__(self, counts: Tensor):
        self._ends = counts.cumsum(0).to(torch.int32)

    def rows(self, x: Tensor) -> list[Tensor]:
        """[rows, ...] as it is."""
        return [x]

    def experts(self, weight: Tensor) -> list[Tensor]:
        """[experts, a, b] as it is."""
        return [weight]

    def product(self, x: Tensor, matrix: Tensor, into: Tensor | None = None) -> Tensor:
        """Rows [rows, a] by their experts' matrices [experts, a, b]."""
        return F.grouped_mm(x, matrix, offs=self._ends)

    def transposed_product(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        """All weight gradients, grad^T x of each expert's rows."""
        into.copy_(F.grouped_mm(grad.t(), x, offs=self._ends))


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, plan: Plan, split: BackwardSplit | None = None
) -> Tensor:
    """As `model.kernels.plain.experts`."""
    parts = AllAtOnce(plan.counts) if x.dtype == torch.bfloat16 else OneByOne(plan.counts)
    return feed_forward(x, gate_up, down, weights, plan, parts, split)
