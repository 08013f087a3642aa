"""Initial weights as a pure function of (seed, parameter name): the same in every parallel layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from model.config import ModelConfig


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Matrices from N(0, initializer_range), norms at one (DeepSeek-V3, arXiv:2412.19437, §4.2).

    Norms' biases start at zero, DyT's alpha at 0.5 (arXiv:2503.10622, §4); passes through the stack after the first
    count 1 / recursion_depth (`model.recursion`). Contextual positions start at none, as in the code of their paper
    (arXiv:2405.18719).
    """
    if name.endswith("recursion.weight"):
        later = torch.full(shape, 1 / config.recursion_depth)
        later[0] = 1.0
        return later
    if name.endswith("position_embedding"):
        return torch.zeros(shape)
    if len(shape) == 1:
        fill = 0.0 if name.endswith(".bias") else 0.5 if name.endswith(".alpha") else 1.0
        return torch.full(shape, fill)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * config.initializer_range


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter; balancing biases start at zero."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_weight(name, parameter.shape, config, seed))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
