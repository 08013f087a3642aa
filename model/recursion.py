"""The same stack of layers applied several times, each pass a refinement of the one before (TRM, arXiv:2510.04871)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig


class Recursion(nn.Module):
    """Adaptive residual scaling: h_{r+1} = h_r + s_r * (stack(h_r) - h_r), with one learned scale a feature and pass.

    The first pass starts at scale one, so it is the stack itself; later ones at 1 / recursion_depth, so that what they
    add to the residual stream does not grow with their number.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.recursion_depth, config.hidden_size))

    def forward(self, before: Tensor, after: Tensor, index: int) -> Tensor:
        """Hidden states before and after pass `index` through the stack, both [..., hidden_size] -> same."""
        return torch.lerp(before, after, self.weight[index].to(after.dtype))


def build_recursion(config: ModelConfig) -> Recursion | None:
    """None for a stack that is applied once, which has no scale."""
    return Recursion(config) if config.recursion_depth > 1 else None
