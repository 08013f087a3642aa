"""Sums gradients over replicas in a few messages, each sent as soon as what it holds is whole.

The first ones travel while the last backward still runs (as in arXiv:2006.15704). Where a zero-bubble schedule computes
weight gradients apart, they go out at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers.linear import weight_gradient_queue
from model.parallel.collectives import Axis, collective
from ray_pipeline.engine import zero_settings


class GradientReduction:
    """The gradients of parameters that every rank of an axis holds.

    Args:
        parameters: in the order of the forward pass; the backward reaches the last ones first.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis):
        self.axis = axis
        self._buckets = _buckets(reversed(list(parameters))) if axis.size > 1 else []
        self._missing: dict[nn.Parameter, int] = {}
        self._sent: list[tuple[Tensor, Any]] = []
        for bucket in self._buckets:
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self, backwards: int) -> None:
        """A step begins: a gradient is whole once it has been added to this many times."""
        self._missing = {parameter: backwards for bucket in self._buckets for parameter in bucket}
        self._sent = []

    def finish(self) -> None:
        """Send what has not gone out and wait. The gradients are then views of the messages: nothing is copied back."""
        while len(self._sent) < len(self._buckets):
            self._send()
        with collective(self.axis, "all-reduce"):
            for _, work in self._sent:
                work.wait()
        self._sent = []
        self._missing = {}

    def _arrived(self, parameter: Tensor) -> None:
        # Outside of a step, or only half of a backward: the hook runs though the gradient was put off.
        if parameter not in self._missing or weight_gradient_queue() is not None:
            return
        self._missing[parameter] -= 1  # type: ignore[index]
        # In the same order on every rank, whatever became whole first.
        while len(self._sent) < len(self._buckets) and self._whole(self._buckets[len(self._sent)]):
            self._send()

    def _whole(self, bucket: list[nn.Parameter]) -> bool:
        return all(self._missing[parameter] <= 0 for parameter in bucket)

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with collective(self.axis, "all-reduce"):
            work = dist.all_reduce(flat, group=self.axis.group, async_op=True)
        self._sent.append((flat, work))
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters, no more together than one message holds, unless one alone has more."""
    out: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not out or parameter.numel() > room:
            out.append([])
            room = zero_settings.MESSAGE
        out[-1].append(parameter)
        room -= parameter.numel()
    return out
