"""Weights in huge pages. A step of one row reads every weight once, and on pages of 4 KB waits for their addresses."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 2**21


def in_huge_pages(x: Tensor) -> Tensor:
    """x, contiguous, in memory for which the system may use huge pages, where that is of use and possible."""
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return x.contiguous()
    memory = mmap.mmap(-1, size + PAGE)  # goes with the tensor over it
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return x.contiguous()
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
    out = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=start)
    return out.view(x.shape).copy_(x)
