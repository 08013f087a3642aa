"""RMSNorm (arXiv:1910.07467) while tokens are generated. Of a single one, starting an operation is what takes time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.layers.norm import RMSNorm, rms_norm


class FastNorm:
    """x / rms(x) * weight: [..., dim] -> same; x has its features side by side."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps
        self.dim = len(norm.weight)
        self._zeros = torch.zeros_like(norm.weight)
        self._is_quick = norm.weight.device.type == "cpu" and norm.weight.dtype == torch.float32 and norm.eps > 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() != self.dim or not self._is_quick:
            return rms_norm(x, self.weight, self.eps)
        one = x.view(-1)
        scale = (torch.dot(one, one).item() / self.dim + self.eps) ** -0.5
        return torch.addcmul(self._zeros, x, self.weight, value=scale)  # one operation in place of two


def prepared(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """What computes the same as `norm` without gradients, and sooner where it can."""
    return FastNorm(norm) if isinstance(norm, RMSNorm) and norm.weight.dtype == torch.float32 else norm
