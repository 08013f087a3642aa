"""Initial weights as a pure function of (seed, parameter name): the same in every parallel layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.residual import initial_scales

OUTPUTS = ("o_proj", "down_proj")  # what writes into the residual stream, one expert's or a stack's


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Matrices from N(0, initializer_range), norms at one (DeepSeek-V3, arXiv:2412.19437, §4.2).

    Or as `config.initialisation` and its kin say.

    Norms' biases start at zero, DyT's alpha at 0.5 (arXiv:2503.10622, §4); passes through the stack after the first
    count 1 / recursion_depth (`model.recursion`). Contextual positions start at none, as in the code of their paper
    (arXiv:2405.18719).
    """
    if name.endswith("recursion.weight"):
        later = torch.full(shape, 1 / config.recursion_depth)
        later[0] = 1.0
        return later
    if name.endswith("residual.weight"):
        return initial_scales(int(name.split(".")[-3]), config.num_hidden_layers)
    if name.endswith("position_embedding") or "value_embedding.gate" in name:  # gates open half
        return torch.zeros(shape)
    if len(shape) == 1:
        fill = 0.0 if name.endswith(".bias") else 0.5 if name.endswith(".alpha") else 1.0
        return torch.full(shape, fill)
    deviation = _deviation(name, shape, config)
    if deviation == 0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * deviation


def _deviation(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """Of a matrix's weights; the last dimension is that of the features read."""
    if name.endswith("embed_tokens.weight"):
        return config.initializer_range if config.embedding_init is None else config.embedding_init
    if name.endswith("lm_head.weight"):
        return config.initializer_range if config.head_init is None else config.head_init
    if config.zero_init_outputs and name.removesuffix(".weight").endswith(OUTPUTS):
        return 0.0
    if config.initialisation == "fan_in" and "value_embedding.table" in name:
        return float(config.hidden_size**-0.5)
    if config.initialisation == "fan_in" and not name.endswith("mlp.gate.weight"):
        return float(shape[-1] ** -0.5)
    return config.initializer_range


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter; balancing biases start at zero."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_weight(name, parameter.shape, config, seed))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
