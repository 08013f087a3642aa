"""Weights in huge pages are the same weights."""

from __future__ import annotations

import mmap

import pytest
import torch

from model.generate.huge_pages import PAGE, in_huge_pages

needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system knows no huge pages")


@needs_advice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor_is_copied_to_the_start_of_a_page(dtype: torch.dtype) -> None:
    x = torch.randn(3, 700, 1024).to(dtype).transpose(1, 2)
    out = in_huge_pages(x)
    assert torch.equal(out, x) and out.is_contiguous() and out.dtype == dtype
    assert out.data_ptr() % PAGE == 0
    out[0, 0, 0] += 1
    assert not torch.equal(out, x)


def test_a_small_one_only_becomes_contiguous() -> None:
    x = torch.randn(4, 6)
    assert in_huge_pages(x) is x
    assert in_huge_pages(x.t()).is_contiguous() and torch.equal(in_huge_pages(x.t()), x.t())


@needs_advice
def test_a_kernel_without_huge_pages_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # refused as an unknown wish
    x = torch.randn(PAGE // 4)
    assert in_huge_pages(x) is x


@needs_advice
def test_the_memory_goes_with_the_tensor() -> None:
    def mapped() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmSize")) * 1024

    x = torch.randn(64 * PAGE // 4)
    before = mapped()
    for _ in range(5):
        out = in_huge_pages(x)
        del out
    assert mapped() - before < 64 * PAGE
