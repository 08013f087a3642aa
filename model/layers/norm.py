"""RMSNorm (arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class RMSNorm(nn.Module):
    """Scales [..., dim] to unit root mean square, in fp32, then by a learned weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of `x`."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def build_norm(config: ModelConfig) -> RMSNorm:
    """The norm in front of a sublayer: [..., hidden_size] -> same."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps)
