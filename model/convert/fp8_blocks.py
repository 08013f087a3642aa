"""Weights as DeepSeek-V3 publishes them: E4M3 with one scale per 128 x 128 block (arXiv:2412.19437, §3.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"  # "<name>.weight_scale_inv": what a block's numbers are multiplied by


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale, from config.json.

    Raises:
        ValueError: anything but two positive numbers.
    """
    given = (config.get("quantization_config") or {}).get("weight_block_size", [128, 128])
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError(f"config.json: quantization_config.weight_block_size={given!r}: must be two positive numbers")
    return given[0], given[1]


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [out, in] float8 times the scale of each one's block -> fp32.

    Args:
        scale: [ceil(out / block[0]), ceil(in / block[1])], any float type (V3.1 on: powers of two).
    Raises:
        ValueError: a scale of another shape, or one that is not positive and finite.
    """
    rows, columns = weight.shape
    expected = [-(-rows // block[0]), -(-columns // block[1])]
    if list(scale.shape) != expected:
        raise ValueError(f"has scales of shape {list(scale.shape)}; blocks of {block[0]} x {block[1]} need {expected}")
    scale = scale.float()
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("has a scale that is not a positive number")
    spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread
