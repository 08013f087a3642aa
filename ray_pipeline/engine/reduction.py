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

from model.kernels.weight_gradients import BackwardSplit
from model.parallel.collectives import Axis, collective
from ray_pipeline.engine import zero_settings


class GradientReduction:
    """The gradients of parameters that every rank of an axis holds.

    Args:
        parameters: in the order of the forward pass; the backward reaches the last ones first.
        split: puts weight gradients off, if the schedule has such backwards.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis, split: BackwardSplit | None = None):
        self.axis, self.split = axis, split
        in_order = reversed(list(parameters)) if axis.size > 1 else []
        self._messages = [_Message(held) for held in split_into_messages(in_order)]
        self._message_of: dict[Tensor, _Message] = {
            parameter: message for message in self._messages for parameter in message.parameters
        }
        self._missing: dict[Tensor, int] = {}  # backwards until a parameter's gradient is whole
        self._sent = 0
        for parameter in self._message_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def expect(self, backwards: int) -> None:
        """A step begins: a gradient is whole once it has been added to this many times."""
        self._missing = dict.fromkeys(self._message_of, backwards)
        self._sent = 0

    @torch.no_grad()
    def finish(self) -> None:
        """Send what has not gone out, and wait. Gradients are then views of the messages; nothing is copied back."""
        for message in self._messages[self._sent :]:
            for parameter in message.parameters:
                if parameter not in message.written:
                    message.write(parameter)
        self._send()
        with collective(self.axis, "all-reduce"):
            for message in self._messages:
                message.wait()
        self._missing = {}

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        # Outside of a step, or only half of a backward: the hook runs though the gradient was put off.
        if parameter not in self._missing or (self.split is not None and self.split.queue is not None):
            return
        self._missing[parameter] -= 1
        if self._missing[parameter] == 0:
            self._message_of[parameter].write(parameter)  # now, while the gradient is in the cache
            self._send()

    def _send(self) -> None:
        """In the same order on every rank, whatever became whole first."""
        while self._sent < len(self._messages) and self._messages[self._sent].whole:
            with collective(self.axis, "all-reduce"):
                self._messages[self._sent].send(self.axis)
            self._sent += 1


class _Message:
    """Gradients side by side in one tensor, from the first whole one until the step lets go of them."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self.place = {parameter: index for index, parameter in enumerate(parameters)}
        self.written: set[Tensor] = set()
        self._flat: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._work: Any = None

    @property
    def whole(self) -> bool:
        return len(self.written) == len(self.parameters)

    def write(self, parameter: Any) -> None:
        """Move the parameter's gradient here; zero if no backward reached it."""
        if self._flat is None:
            self._flat = torch.empty(sum(self.sizes), dtype=parameter.dtype, device=parameter.device)
            self._parts = self._flat.split(self.sizes)
        part = self._parts[self.place[parameter]].view_as(parameter)
        if parameter.grad is None:
            part.zero_()
        else:
            part.copy_(parameter.grad)
        parameter.grad = part
        self.written.add(parameter)

    def send(self, axis: Axis) -> None:
        self._work = dist.all_reduce(self._flat, group=axis.group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        self._work, self._flat, self._parts = None, None, ()
        self.written.clear()


def split_into_messages(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
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
