"""What a block reads of the residual stream: learned shares of the stream and of the embedding it began with.

A simple form of DenseFormer's averages over earlier layers (arXiv:2402.02622, §3), which weigh all of them; karpathy's
nanochat has these two. No published class has them: such a model is exported in this project's own format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig

STREAM, EMBEDDING = (1.15, 1.05), (0.20, 0.05)  # initial shares of the first and of the last layer


class ResidualScales(nn.Module):
    """x <- a x + b x_0, two numbers a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        """The stream and the embedding of the same tokens, both [..., hidden_size] -> same."""
        a, b = self.weight.to(x.dtype).unbind()
        return a * x + b * start


def initial_scales(layer: int, num_layers: int) -> Tensor:
    """Where a layer's two shares start, [2]: the deeper, the less of the embedding."""
    depth = layer / max(1, num_layers - 1)
    return torch.tensor([first + (last - first) * depth for first, last in (STREAM, EMBEDDING)])


def build_residual_scales(config: ModelConfig, layer: int) -> ResidualScales | None:
    """None where a block reads the stream as it is: without `residual_scales`, and in MTP modules."""
    return ResidualScales() if config.residual_scales and layer < config.num_hidden_layers else None
