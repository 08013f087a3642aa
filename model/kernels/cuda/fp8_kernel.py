"""Block-scaled products on Hopper's tensor cores, through `torch.nn.functional.scaled_mm`.

Used on a GPU only after it has given there, once, what the plain computation gives: which shapes and scale layouts
torch accepts differs with its version and CUDA's.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
_ROWS = 16  # the kernel reads scales 16 bytes at a time
_CHECKED = (48, 256, 384)  # rows, columns, and features that are summed over


def kernel_for(device: torch.device) -> bool:
    """Whether products on this device run on its tensor cores."""
    return device.type == "cuda" and _works(device.index or 0)


@functools.cache
def _works(index: int) -> bool:
    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    m, n, k = _CHECKED
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, k, device=device, generator=generator).to(torch.float8_e4m3fn) for rows in (m, n))
    tiles = torch.rand(m, k // TILE, device=device, generator=generator) + 0.5
    ok = True
    for scale in (
        torch.rand(n // TILE, k // TILE, device=device, generator=generator) + 0.5,
        torch.rand(n, k // TILE, device=device, generator=generator) + 0.5,
    ):
        spread = scale.repeat_interleave(n // len(scale), 0).repeat_interleave(TILE, 1)
        meant = (a.float() * tiles.repeat_interleave(TILE, 1)) @ (b.float() * spread).t()
        try:
            found = kernel_product(a, tiles, b, scale, torch.float32)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("fp8 without tensor cores: %s", str(error).splitlines()[0])
            return False
        ok = ok and bool((found - meant).abs().max() <= 1e-2 * meant.abs().max())
    if not ok:
        logging.getLogger(__name__).warning("fp8 without tensor cores: the kernel's numbers are not those meant")
    return ok


def kernel_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a [m, k] x b [n, k] -> [m, n]; `a` in 1 x 128 tiles, `b` in 128 x 128 blocks or 1 x 128 tiles (by its scale).

    Whole tiles are made by zeros.
    """
    m, n = a.shape[0], b.shape[0]
    blocks = b_scale.shape[0] != n or n == 1
    a, b = _filled(a, _ROWS), _filled(b, TILE)
    a_scale = F.pad(a_scale, (0, 0, 0, len(a) - len(a_scale)), value=1.0)
    if blocks:
        # The blocks' scales are read four at a time along k.
        right = F.pad(b_scale, (0, -b_scale.shape[1] % 4), value=1.0).contiguous().t()
    else:
        right = _rows_together(F.pad(b_scale, (0, 0, 0, len(b) - n), value=1.0))
    kinds = F.ScalingType
    out = F.scaled_mm(
        a, b.t(), _rows_together(a_scale), kinds.BlockWise1x128, right,
        kinds.BlockWise128x128 if blocks else kinds.BlockWise1x128, output_dtype=dtype,
    )  # fmt: skip
    return out[:m, :n]


def _filled(x: Tensor, rows: int) -> Tensor:
    """[r, k] -> zeros added up to a multiple of `rows` rows and of 128 columns."""
    missing = (0, -x.shape[1] % TILE, 0, -x.shape[0] % rows)
    return F.pad(x.view(torch.uint8), missing).view(x.dtype).contiguous()  # all bits zero is the number zero


def _rows_together(scale: Tensor) -> Tensor:
    """The same [rows, tiles], rows next to each other in memory, as the kernel reads them."""
    return scale.t().contiguous().t()
