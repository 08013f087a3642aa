"""Matrix products of 8-bit floats with a scale per tile (DeepSeek-V3, arXiv:2412.19437, §3.3).

All three products of a linear layer (Fprop, Dgrad, Wgrad) read E4M3: activations and gradients with a scale for each
1 x 128 tile along the dimension that is summed over, weights with one for each 128 x 128 block; they accumulate in
fp32. The input is kept for backward in 8 bits and quantised again along tokens for Wgrad (§3.3.3).

Scales are powers of two, as §3.3.3 has it for what is quantised twice and V3.1 for everything. So an element's rounding
does not depend on its tile, unless it is some 2^15 times smaller than the tile's largest: tiles that end elsewhere, as
other parallel layouts and micro-batches make them, change a result by its last bits and not by a rounding to 8.

Products run on tensor cores where `model.kernels.cuda.fp8_kernel` can; elsewhere the same numbers are multiplied in
fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cuda.fp8_kernel import kernel_for, kernel_product
from model.kernels.weight_gradients import BackwardSplit, weight_gradient
from model.layers.linear import operand_dtype, without_autocast

TILE = 128
LARGEST = 448.0  # of E4M3
_SMALLEST_EXPONENT = -100  # a tile of zeros has a scale too, and its inverse is a number


@dataclass(frozen=True)
class Quantised:
    """E4M3 `values` [..., rows, columns]; `scale` [..., rows or ceil(rows / 128), ceil(columns / 128)] in fp32."""

    values: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """The numbers that are meant, in fp32."""
        scale = self.scale
        rows, columns = self.values.shape[-2:]
        if scale.shape[-2] != rows:
            scale = scale.repeat_interleave(TILE, -2)[..., :rows, :]
        return self.values.float() * scale.repeat_interleave(TILE, -1)[..., :columns]


def _scale(largest: Tensor) -> Tensor:
    """The smallest power of two that brings a magnitude down to what E4M3 holds."""
    mantissa, exponent = torch.frexp(largest / LARGEST)  # a mantissa of 0.5 is itself a power of two, others are above
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_min(_SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _padded(x: Tensor, *, rows: bool) -> Tensor:
    """Zeros up to whole tiles: [..., r, c] -> [..., R / 128, 128, C / 128, 128], or [..., r, 1, C / 128, 128]."""
    r, c = x.shape[-2:]
    x = F.pad(x, (0, -c % TILE, 0, -r % TILE if rows else 0))
    return x.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE if rows else 1))


def _quantise(x: Tensor, *, rows: bool) -> Quantised:
    tiles = _padded(x.detach().float(), rows=rows)
    scale = _scale(tiles.abs().amax((-3, -1)))
    values = (tiles / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    whole = values.flatten(-4, -3).flatten(-2)
    return Quantised(whole[..., : x.shape[-2], : x.shape[-1]], scale)


def quantise_tiles(x: Tensor) -> Quantised:
    """[..., rows, columns] with a scale for each 1 x 128 tile."""
    return _quantise(x, rows=False)


def quantise_blocks(weight: Tensor) -> Quantised:
    """[..., out, in] with a scale for each 128 x 128 block."""
    return _quantise(weight, rows=True)


def _product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a [m, k] x b [n, k] -> [m, n], summed in fp32; both have their tiles along k."""
    if kernel_for(a.values.device):
        return kernel_product(a.values, a.scale, b.values, b.scale, dtype)
    return torch.mm(a.dequantise(), b.dequantise().t()).to(dtype)


def _transposed(weight: Quantised) -> Quantised:
    return Quantised(weight.values.transpose(-1, -2), weight.scale.transpose(-1, -2))


def _products(x: Quantised, weight: Quantised, groups: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of group e times matrix e: [rows, k] x [groups, n, k] -> [rows, n]."""
    out = x.values.new_empty(x.values.shape[0], weight.values.shape[-2], dtype=dtype)
    pieces = zip(x.values.split(groups), x.scale.split(groups), out.split(groups), strict=True)
    for e, (values, scale, y) in enumerate(pieces):
        if len(y):
            y.copy_(_product(Quantised(values, scale), Quantised(weight.values[e], weight.scale[e]), dtype))
    return out


def _weight_gradient(grad: Tensor, x: Quantised, groups: list[int]) -> Tensor:
    """grad [rows, out], x [rows, in] -> [groups, out, in] in fp32, tiles along the rows of each group."""
    out = grad.new_zeros(len(groups), grad.shape[1], x.values.shape[1], dtype=torch.float32)
    for g, rows, dweight in zip(grad.split(groups), x.dequantise().split(groups), out.unbind(0), strict=True):
        if len(g):
            dweight.copy_(_product(quantise_tiles(g.t()), quantise_tiles(rows.t()), torch.float32))
    return out


class _Fp8Linear(torch.autograd.Function):
    """x [rows, in], weight [out, in] for all rows, or [groups, out, in] for each group's. `weight` is a parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        groups: list[int],
        dtype: torch.dtype,
        owner: tuple[Tensor],
        split: BackwardSplit | None,
    ) -> Tensor:
        with without_autocast(x):
            quantised = quantise_tiles(x)
            ctx.save_for_backward(quantised.values, quantised.scale, weight)
            ctx.groups, ctx.owner, ctx.split, ctx.x_dtype = groups, owner, split, x.dtype
            matrices = quantise_blocks(weight if weight.dim() == 3 else weight.unsqueeze(0))
            return _products(quantised, matrices, groups, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        values, scale, weight = ctx.saved_tensors
        grad, groups, x = grads[0].contiguous(), ctx.groups, Quantised(values, scale)
        need_input, need_weight, *_ = ctx.needs_input_grad
        dx = None
        with without_autocast(grad):
            if need_input:
                matrices = quantise_blocks(weight if weight.dim() == 3 else weight.unsqueeze(0))
                dx = _products(quantise_tiles(grad), _transposed(matrices), groups, ctx.x_dtype)
        if not need_weight:
            return dx, None, None, None, None, None

        def gradient() -> Tensor:
            with without_autocast(grad):
                return _weight_gradient(grad, x, groups).view(weight.shape)

        return dx, weight_gradient(ctx.split, ctx.owner[0], gradient), None, None, None, None


def fp8_linear(x: Tensor, weight: Tensor, split: BackwardSplit | None = None) -> Tensor:
    """[..., in] x [out, in] -> [..., out] in autocast's dtype, or that of `x`. `weight` is a parameter."""
    rows = x.reshape(-1, x.shape[-1])
    out = _Fp8Linear.apply(rows, weight, [len(rows)], operand_dtype(x), (weight,), split)
    return out.view(*x.shape[:-1], -1)


def fp8_grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, split: BackwardSplit | None = None) -> Tensor:
    """Expert e's weight on its rows.

    Args:
        x: [rows, in], sorted by expert. weight: [experts, out, in], a parameter. counts: [experts] rows of each.
    """
    return _Fp8Linear.apply(x, weight, counts.tolist(), operand_dtype(x), (weight,), split)
