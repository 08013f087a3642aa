"""Products are the same whichever library makes them, and the slow way into oneDNN is never taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.kernels import limits as processor
from model.kernels.cpu import products
from model.kernels.cpu.products import Factor, by_onednn, product, transposed_product
from model.kernels.limits import onednn_is_quicker

sizes = st.integers(1, 40)
kinds = st.sampled_from(["in order", "transposed", "part of each row"])
INTEL = "vendor_id : GenuineIntel\nflags : fpu avx512f avx512bw avx512cd avx512dq avx512vl\n"


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"], scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Either library for products of any size, whatever the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_is_quicker", lambda: request.param)
        patch.setattr(products, "LEAST", 1)
        patch.setattr(products, "FEWEST", 1)
        patch.setattr(products, "LEAST_ORDERED", 1)
        yield request.param


def laid_out(rows: int, columns: int, kind: str) -> Tensor:
    if kind == "transposed":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, 2 * columns)[:, :columns] if kind == "part of each row" else torch.randn(rows, columns)


def close(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@given(sizes, sizes, sizes, kinds, kinds)
def test_a_product_is_the_exact_one_rounded(library: bool, m: int, k: int, n: int, first: str, second: str) -> None:
    a, b = laid_out(m, k, first), laid_out(k, n, second)
    assert by_onednn(a) is library
    exact, into = a.double() @ b.double(), torch.empty(m, n)
    close(product(a, b), exact)
    close(product(a, b, into), exact)
    assert torch.equal(into, product(a, b))


@given(sizes, sizes, sizes, kinds, kinds)
def test_a_transposed_product_too(library: bool, k: int, m: int, n: int, first: str, second: str) -> None:
    a, b, into = laid_out(k, m, first), laid_out(k, n, second), torch.empty(m, n)
    exact = a.double().t() @ b.double()
    close(transposed_product(a, b), exact)
    close(transposed_product(a, b, into), exact)


@given(st.lists(sizes, min_size=1, max_size=3), sizes, sizes, kinds, kinds)
def test_a_factors_products_are_exact_however_many_rows_come(
    library: bool, rows: list[int], k: int, n: int, first: str, second: str
) -> None:
    matrix = laid_out(k, n, second)
    factor, kept = Factor(matrix), matrix.clone()
    for m in rows:
        a, x = laid_out(m, k, first), torch.randn(m, n)
        exact = a.double() @ kept.double()
        close(factor.product(a), exact)
        close(factor.added_product(x, a), x.double() + exact)
    assert torch.equal(matrix, kept)


def test_a_factor_in_bf16_rounds_as_torch_does() -> None:
    matrix = torch.randn(48, 64).bfloat16()
    factor = Factor(matrix)
    for m in (1, 3, 40):
        a = torch.randn(m, 48).bfloat16()
        torch.testing.assert_close(factor.product(a), a @ matrix)


def test_a_matrix_is_ordered_once_and_not_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST_ORDERED", 2**19)
    factor = Factor(torch.randn(256, 256))
    factor.product(torch.randn(1, 256))
    assert factor._ordered is None
    factor.product(torch.randn(64, 256))
    ordered = factor._ordered
    assert ordered is not None
    factor.product(torch.randn(65, 256))
    assert factor._ordered is ordered


def test_bf16_is_left_to_torch(library: bool) -> None:
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    assert not by_onednn(a)
    assert torch.equal(product(a, b), a @ b)


def test_onednn_gets_no_part_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would multiply without a kernel: seconds instead of milliseconds."""
    given_: list[Tensor] = []

    class Recorder:
        def _linear_pointwise(self, a: Tensor, weight: Tensor, *rest: object) -> Tensor:
            given_.append(weight)
            return a @ weight.t()

    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Recorder())
    for kind in ("in order", "transposed", "part of each row"):
        product(torch.randn(256, 128), laid_out(128, 128, kind))
    assert len(given_) == 3
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in given_)


@pytest.mark.parametrize(
    ("about", "quicker"),
    [
        (INTEL, False),
        (INTEL.replace("GenuineIntel", "AuthenticAMD"), True),
        (INTEL.replace("GenuineIntel", "AuthenticAMD").replace("avx512f", "avx2"), False),
        ("", False),
    ],
    ids=["Intel", "AMD", "AMD without AVX-512", "another kind"],
)
def test_the_library_is_chosen_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, about: str, quicker: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(about)
    monkeypatch.setattr(processor, "Path", lambda name: file)
    assert onednn_is_quicker.__wrapped__() is quicker
