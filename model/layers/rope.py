"""Rotary positions (arXiv:2104.09864) with YaRN (arXiv:2309.00071).

Pairs are interleaved: features 2i and 2i+1 turn together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 * mscale * ln(factor) + 1 (arXiv:2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(qk_head_dim), times YaRN's temperature squared: both query and key would carry it."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _yarn_frequencies(freq: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Keep fast dimensions, stretch slow ones by `factor`, blend between (eqs. 17-19)."""
    dim = 2 * freq.numel()

    def dimension_with(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_with(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_with(scaling.beta_slow)), dim - 1)
    stretch = ((torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freq * (1 - stretch) + freq / scaling.factor * stretch


def rotary_table(config: ModelConfig) -> Tensor:
    """exp(i * position * frequency): complex64 [max_position_embeddings, rotary_dim / 2], on the CPU."""
    # The device is named because on "meta" these operations would load torch's compiler, which takes a second.
    exponent = torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim
    freq = config.rope_theta**-exponent
    magnitude = 1.0
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        freq = _yarn_frequencies(freq, config.rope_theta, scaling)
        magnitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    angle = torch.outer(torch.arange(config.max_position_embeddings, device="cpu").float(), freq)
    return torch.polar(torch.full_like(angle, magnitude), angle)


def _pairs(x: Tensor) -> Tensor:
    """fp32 [..., dim], the first or last part of wider rows -> complex [..., dim / 2], a view where possible."""
    if any(step % 2 for step in x.stride()[:-1]):  # rows of odd width: a complex number begins at an even place
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def apply_rotary(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of x [batch, seq, heads, dim] by rotation [batch or 1, seq, dim / 2]."""
    return torch.view_as_real(_pairs(x.float()) * rotation.unsqueeze(2)).flatten(-2).to(x.dtype)
