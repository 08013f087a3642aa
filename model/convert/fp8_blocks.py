"""Weights as DeepSeek-V3 publishes them: E4M3 with one scale per 128 x 128 block (arXiv:2412.19437, §3.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.layers.fp8 import TILE, quantise_blocks

_MATRICES = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk", "gate_proj", "up_proj",
    "down_proj",
)  # fmt: skip
# What config.json says of such a checkpoint, as DeepSeek's does; scales are powers of two, as from V3.1 on.
QUANTISATION = {
    "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
    "weight_block_size": [TILE, TILE],
}  # fmt: skip
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


def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A published tensor as an FP8 checkpoint holds it: matrices of attention and feed-forward in E4M3 with their
    scales; embedding, head, router, norms and what joins an MTP module's inputs in bf16; the balancing bias in fp32."""
    if name.rpartition(".")[0].rpartition(".")[2] not in _MATRICES:
        kind = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        return {name: weight.detach().to("cpu", kind, copy=True).contiguous()}
    made = quantise_blocks(weight.detach().to("cpu", torch.float32))
    return {name: made.values.contiguous(), name + SCALE_SUFFIX: made.scale.contiguous()}
