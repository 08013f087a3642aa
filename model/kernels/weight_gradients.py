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


class BackwardSplit:
    """Cuts backwards in two: one object for all layers that a rank has.

    A layer that was given one builds a graph whose backward can be cut. What has none (norms, embeddings) gets its
    gradient at once.

    Attributes:
        queue: where a backward that runs now puts its weight gradients; None if it is to compute them itself.
    """

    def __init__(self) -> None:
        self.queue: WeightGradients | None = None

    @contextmanager
    def deferred(self) -> Iterator[WeightGradients]:
        """Backwards within compute input gradients at once and put weight gradients into the queue that this yields."""
        before, self.queue = self.queue, WeightGradients()
        try:
            yield self.queue
        finally:
            self.queue = before


def weight_gradient(split: BackwardSplit | None, parameter: Tensor, gradient: Callable[[], Tensor]) -> Tensor | None:
    """What a layer's backward returns for its parameter: `gradient()`, or None where that is put off."""
    if split is None or split.queue is None:
        return gradient()
    split.queue.add(parameter, gradient)
    return None
