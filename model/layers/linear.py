"""The model's matrix product, in one place so that it can be swapped, and so that its backward can be cut in two.

Zero-bubble pipelines (arXiv:2401.10241) run the gradient of the input at once, because the previous stage waits for
it, and the gradient of the weight later, when there is nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.limits import LEAST
from model.kernels.product import by_onednn, product, transposed_product


class WeightGradients:
    """Work that a backward left for later, in the order in which it came up."""

    def __init__(self) -> None:
        self._work: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        return len(self._work)

    def add(self, parameter: Tensor, gradient: Callable[[], Tensor]) -> None:
        """`gradient()` is to be added to `parameter.grad`; it keeps what it needs alive until then."""
        assert parameter.is_leaf, "the gradient would be lost"
        self._work.append((parameter, gradient))

    @torch.no_grad()
    def run(self) -> None:
        """Compute and accumulate every gradient, letting go of its inputs one by one."""
        self._work.reverse()
        while self._work:
            parameter, gradient = self._work.pop()
            # In the parameter's own order, as autograd would hand it over: optimizers read both side by side.
            value = gradient().to(parameter.dtype).contiguous()
            parameter.grad = value if parameter.grad is None else parameter.grad.add_(value)


class _Mode:
    """Of the whole process, not of a thread: autograd runs a GPU's backwards in threads of its own."""

    separable = False
    queue: WeightGradients | None = None


@contextmanager
def separable_backward(enabled: bool = True) -> Iterator[None]:
    """Forwards within build a graph whose backward `deferred_weight_gradients` can cut in two.

    Backwards of layers that are checkpointed run their forward again: they must be within too.
    """
    before, _Mode.separable = _Mode.separable, enabled
    try:
        yield
    finally:
        _Mode.separable = before


@contextmanager
def deferred_weight_gradients() -> Iterator[WeightGradients]:
    """Backwards within compute input gradients at once and put weight gradients into the queue that this yields.

    Needs a forward under `separable_backward`; what was not built there (norms, embeddings) gets its gradient at once.
    """
    before, _Mode.queue = _Mode.queue, WeightGradients()
    try:
        yield _Mode.queue
    finally:
        _Mode.queue = before


def backward_is_separable() -> bool:
    """Whether what is computed now must be able to put off its weight gradient."""
    return _Mode.separable and torch.is_grad_enabled()


def weight_gradient_queue() -> WeightGradients | None:
    """Where a backward puts its weight gradients now; None if it is to compute them itself."""
    return _Mode.queue


class _SeparableLinear(torch.autograd.Function):
    """x @ weight.T by `product`, whose backward can be cut in two. `owner` holds the parameter that `weight` is (a copy
    of, under autocast)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, owner: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner = owner
        return _rows(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_input, need_weight, _ = ctx.needs_input_grad
        grad = grads[0]
        dx = _rows(grad, weight) if need_input else None
        if not need_weight:
            return dx, None, None

        def gradient() -> Tensor:
            return transposed_product(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))

        queue = weight_gradient_queue()
        if queue is None:
            return dx, gradient(), None
        queue.add(ctx.owner[0], gradient)
        return dx, None, None


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """[..., k] x [k, n] -> [..., n]."""
    return product(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], matrix.shape[1])


def operand_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x is computed in: autocast's dtype, or that of x where there is none."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def as_operand(x: Tensor) -> Tensor:
    """x as matrix products read it: where several do, one cast serves them, and sums their gradients in its dtype."""
    return x.to(operand_dtype(x))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """What runs within computes in the dtypes that it is given. Where there is no autocast this costs nothing."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_better_by_product(x: Tensor, weight: Tensor) -> bool:
    """Small ones, as where tokens are generated one by one, are not even asked for their dtype."""
    return x.numel() * weight.shape[0] >= LEAST and operand_dtype(x) == torch.float32 and by_onednn(x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in] x [out, in] -> [..., out]; `weight` is a parameter. Follows autocast as `F.linear` does."""
    if not backward_is_separable() and not _is_better_by_product(x, weight):
        return F.linear(x, weight)
    dtype = operand_dtype(x)
    return _SeparableLinear.apply(x.to(dtype), weight.to(dtype), (weight,))


class Linear(nn.Linear):
    """`nn.Linear` without bias, whose weight gradient can be computed apart.

    Attributes:
        product: the matrix product, (x, weight parameter) -> output.
    """

    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(linear)

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.product(x, self.weight)
