"""Initial weights as a pure function of (seed, parameter name): the same in every parallel layout."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from model.config import ModelConfig


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Matrices from N(0, initializer_range), norms at one, balancing biases at zero (arXiv:2412.19437, §4.2)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(parameter.shape, generator=generator) * config.initializer_range
        parameter.copy_(values)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
