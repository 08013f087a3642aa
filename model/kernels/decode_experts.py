"""Routed experts for a few tokens, without autograd's bookkeeping.

Three ways to the same sum; which is quickest depends on how many rows there are, as measured on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu.products import Factor, by_onednn, product
from model.kernels.limits import DENSE_ROWS_ON_GPU, FEW_CHOICES, WASTE, WASTE_BY_ONEDNN


class DecodeExperts:
    """Weights are stored [experts, in, out].

    Args:
        gate_up: [experts, 2 * inner, hidden], gate first. down: [experts, hidden, inner].
    """

    def __init__(self, gate_up: Tensor, down: Tensor):
        self.gate_up, self.down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.wide = Factor(gate_up.flatten(0, 1).t())  # [in, experts * out]
        self.tall = Factor(self.down.flatten(0, 1))  # [experts * in, out]
        self.num_experts, self.hidden, width = self.gate_up.shape
        self.inner = width // 2
        self.matrices = list(zip(self.gate_up.unbind(0), self.down.unbind(0), strict=True))

    def added(self, residual: Tensor, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """residual plus the experts' weighted sum: residual, x [rows, hidden]; indices, weights [rows, k] -> residual's
        shape."""
        rows, k = indices.shape
        if x.device.type == "cuda":
            dense = rows <= DENSE_ROWS_ON_GPU and self.num_experts <= DENSE_ROWS_ON_GPU
            return (self._all if dense else self._sorted)(residual, x, indices, weights)
        if rows * k <= FEW_CHOICES:
            return self._one_by_one(residual, x, indices, weights)
        waste = 6 * (self.num_experts - k) * rows * self.hidden * self.inner
        dense = waste <= (WASTE_BY_ONEDNN if by_onednn(x) else WASTE)
        return (self._all if dense else self._sorted)(residual, x, indices, weights)

    def _one_by_one(self, residual: Tensor, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        k = indices.shape[1]
        gate_up, out = x.new_empty(indices.numel(), 1, 2 * self.inner), residual.clone()
        chosen = [self.matrices[expert] for expert in indices.flatten().tolist()]
        given, made = x.unsqueeze(1).unbind(), out.unsqueeze(1).unbind()
        for place, (into, (matrix, _)) in enumerate(zip(gate_up.unbind(), chosen, strict=True)):
            torch.mm(given[place // k], matrix, out=into)
        inner = self._activate(gate_up).mul_(weights.reshape(-1, 1, 1).to(x.dtype))
        for place, (row, (_, matrix)) in enumerate(zip(inner.unbind(), chosen, strict=True)):
            made[place // k].addmm_(row, matrix)
        return out

    def _all(self, residual: Tensor, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        share = torch.zeros(x.shape[0], self.num_experts, device=x.device).scatter_(1, indices, weights).to(x.dtype)
        inner = self._activate(self.wide.product(x).unflatten(1, (self.num_experts, -1)))  # [rows, experts, inner]
        return self.tall.added_product(residual, inner.mul_(share.unsqueeze(2)).flatten(1))

    def _sorted(self, residual: Tensor, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        chosen = indices.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        row = order // indices.shape[1]
        gate_up = self._per_expert(x.index_select(0, row), 0, 2 * self.inner, counts)
        inner = self._activate(gate_up).mul_(weights.flatten()[order].unsqueeze(1).to(x.dtype))
        return residual.index_add(0, row, self._per_expert(inner, 1, self.hidden, counts))

    def _activate(self, gate_up: Tensor) -> Tensor:
        return F.silu(gate_up[..., : self.inner]).mul_(gate_up[..., self.inner :])

    def _per_expert(self, x: Tensor, which: int, width: int, counts: list[int]) -> Tensor:
        """Rows sorted by expert times each one's matrix: 0 gate_up, 1 down."""
        out = x.new_empty(x.shape[0], width)
        for rows, into, matrices in zip(x.split(counts), out.split(counts), self.matrices, strict=True):
            if len(rows):
                product(rows, matrices[which], into)
        return out
