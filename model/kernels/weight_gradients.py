"""When gradients of weights are computed: in the backward pass, or later.

Zero-bubble pipelines (arXiv:2401.10241) run the gradient of the input at once, because the previous stage waits for
it, and the gradient of the weight later, when there is nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
