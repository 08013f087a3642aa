"""Matrix products, where fp32 on the CPU goes to the quicker of the two libraries that torch brings.

`torch.mm` calls MKL, from whose kernels oneDNN's differ by what they make of a processor (`model.kernels.limits`).
oneDNN compiles a kernel for each new shape: sizes that change at every step are best rounded up (`row_multiple`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.limits import FEWEST, LEAST, LEAST_ORDERED, onednn_is_quicker, row_step


def by_onednn(x: Tensor) -> bool:
    """Whether large products of x are oneDNN's where `torch.mm`'s would not be."""
    fp32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return fp32 and onednn_is_quicker() and torch.backends.mkldnn.is_available()


def _is_large(a: Tensor, b: Tensor) -> bool:
    return a.shape[0] >= FEWEST and a.shape[0] * b.numel() >= LEAST


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """[m, k] x [k, n] -> [m, n], as `torch.mm`, without a gradient."""
    if a.dtype == torch.bfloat16 or not (_is_large(a, b) and by_onednn(a)):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # else it would take a thousand times longer
    made = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return made if out is None else out.copy_(made)


def transposed_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a^T b: [k, m], [k, n] -> [m, n], without a gradient."""
    (k, m), n = a.shape, b.shape[1]
    if k * n + m * n < k * m and a.is_contiguous() and by_onednn(a):
        # oneDNN copies a first factor that is transposed, and would copy a second one that is a part of each row: b and
        # the result are less to turn.
        return product(b.t(), a, None if out is None else out.t()).t()
    return product(a.t(), b, out)


def row_multiple(x: Tensor, matrix: int, rows: float) -> int:
    """What every expert's number of rows is rounded up to.

    Routing makes new ones at every step: in bf16 that is five times slower on a CPU than a few sizes that repeat.

    Args:
        x: of the dtype that is multiplied. matrix: elements of an expert's larger matrix. rows: what an expert gets on
            average.
    """
    if x.device.type != "cpu":
        return 1
    bf16 = x.dtype == torch.bfloat16
    return row_step(rows, bf16=bf16) if bf16 or (by_onednn(x) and rows * matrix >= LEAST) else 1


class Factor:
    """A matrix [k, n] that many products share, each without a gradient: a weight while tokens are generated.

    oneDNN turns a matrix into an order of its own at every product. Here it does so once, when the first product comes
    that is worth it; the copy stays.
    """

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self._size = matrix.numel()
        self._ordered: Tensor | None = None

    def product(self, a: Tensor) -> Tensor:
        """[m, k] -> [m, n]."""
        if not self._is_worth_it(a):
            return torch.mm(a, self.matrix)
        if self._ordered is None:
            self._ordered = torch.ops.mkldnn._reorder_linear_weight(self.matrix.t().contiguous(), None)
        return torch.ops.mkldnn._linear_pointwise(a, self._ordered, None, "none", [], "")

    def added_product(self, x: Tensor, a: Tensor) -> Tensor:
        """x [m, n] plus the product of a [m, k]."""
        return self.product(a).add_(x) if self._is_worth_it(a) else torch.addmm(x, a, self.matrix)

    def _is_worth_it(self, a: Tensor) -> bool:
        if a.dtype == torch.bfloat16:  # oneDNN's in any case
            return a.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return a.shape[0] * self._size >= LEAST_ORDERED and by_onednn(a)


class FactorInPlace:
    """As `Factor`, of weights [n_i, k] that lie one below the other and are read where they are: nothing is copied."""

    def __init__(self, *weights: Tensor):
        self.matrices = [weight.t() for weight in weights]

    def product(self, a: Tensor) -> Tensor:
        """[m, k] -> [m, n]."""
        made = [torch.mm(a, matrix) for matrix in self.matrices]
        return made[0] if len(made) == 1 else torch.cat(made, 1)

    def added_product(self, x: Tensor, a: Tensor) -> Tensor:
        """x [m, n] plus the product of a [m, k]."""
        return self.product(a).add_(x)


def factor(*weights: Tensor, in_place: bool) -> Factor | FactorInPlace:
    """What multiplies by weights [n_i, k], one below the other: [m, k] -> [m, n]."""
    if in_place:
        return FactorInPlace(*weights)
    return Factor((weights[0] if len(weights) == 1 else torch.cat(weights)).t().contiguous())
