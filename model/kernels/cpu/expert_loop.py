"""Routed experts one after the other: what a product reads has just been written and lies in a core's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.cpu.products import product, transposed_product
from model.kernels.expert_node import feed_forward
from model.kernels.rows import Plan
from model.kernels.weight_gradients import BackwardSplit


class OneByOne:
    """The rows of one expert at a time.

    Args:
        counts: [experts] rows of each one.
    """

    writes_into = True

    def __init__(self, counts: Tensor):
        self._sizes: list[int] = counts.tolist()

    def rows(self, x: Tensor) -> list[Tensor]:
        """[rows, ...] -> that of each expert."""
        return list(torch.split_with_sizes(x, self._sizes))

    def experts(self, weight: Tensor) -> list[Tensor]:
        """[experts, a, b] -> [a, b] of each."""
        return list(weight.unbind(0))

    def product(self, x: Tensor, matrix: Tensor, into: Tensor | None = None) -> Tensor:
        """An expert's rows [rows, a] by its matrix [a, b]."""
        return product(x, matrix, into)

    def transposed_product(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        """An expert's weight gradient, grad^T x, as whatever dtype `into` is of."""
        if into.dtype == x.dtype:
            transposed_product(grad, x, into)
        else:
            into.copy_(transposed_product(grad, x))


def experts(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, plan: Plan, split: BackwardSplit | None = None
) -> Tensor:
    """As `model.kernels.plain.experts`."""
    return feed_forward(x, gate_up, down, weights, plan, OneByOne(plan.counts), split)
