"""Gradients of replicas are summed, part of them while the last backward still runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.build import split_backward
from model.kernels.weight_gradients import BackwardSplit
from model.layers.linear import Linear
from model.parallel.collectives import Axis
from model.parallel.mesh import Mesh, MeshSizes
from ray_pipeline.engine import reduction, zero_settings
from tests.distributed import run_ranks


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_messages_hold_every_parameter_once_and_no_more_than_fits(sizes: list[int], room: int) -> None:
    parameters = [nn.Parameter(torch.empty(size)) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_settings, "MESSAGE", room)
        messages = reduction.split_into_messages(parameters)
    assert [id(p) for message in messages for p in message] == [id(p) for p in parameters]
    assert all(len(message) == 1 or sum(p.numel() for p in message) <= room for message in messages)


def test_one_replica_sends_nothing_and_its_gradients_are_left_alone() -> None:
    weight = nn.Parameter(torch.ones(3))
    alone = reduction.GradientReduction([weight], Axis())
    alone.expect(1)
    (weight * torch.arange(3.0)).sum().backward()
    before = weight.grad
    alone.finish()
    assert weight.grad is before


@dataclass
class Seen:
    """Of every step: messages out before the backward ended, and the gradients after the step."""

    early: list[int]
    gradients: list[list[torch.Tensor]]


class Model(nn.Module):
    """Three layers, and one that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Linear(4, 4) for _ in range(3))
        self.idle = Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().sum()


def inputs(rank: int, step: int, backward: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + 10 * backward + rank))


def two_replicas(rank: int, deferred: bool) -> Seen:
    zero_settings.MESSAGE = 16  # a message per layer
    model, split = Model(), BackwardSplit()
    if deferred:
        split_backward(model, split)
    summed = reduction.GradientReduction(model.parameters(), Mesh(MeshSizes(dp=2)).axis("replica"), split)
    seen = Seen([], [])
    for step in range(2):
        summed.expect(2)
        for backward in range(2):
            loss = model(inputs(rank, step, backward))
            if deferred and backward == 1:
                with split.deferred() as work:
                    loss.backward()
                work.run()
            else:
                loss.backward()
        seen.early.append(summed._sent)
        summed.finish()
        seen.gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    return seen


@pytest.mark.parametrize("deferred", [False, True])
def test_two_replicas_get_the_sum_of_all_backwards(deferred: bool) -> None:
    found = run_ranks(two_replicas, 2, deferred)
    for step in range(2):
        model = Model()
        for rank in range(2):
            for backward in range(2):
                model(inputs(rank, step, backward)).backward()
        for seen in found:
            *reached, idle = seen.gradients[step]
            for parameter, gradient in zip(model.layers.parameters(), reached, strict=True):
                torch.testing.assert_close(gradient, parameter.grad)
            assert not idle.any(), "no rank reached it"


def test_messages_go_out_in_a_fixed_order_while_the_backward_runs() -> None:
    """The idle layer is first in that order and never whole, so all wait for it; without it they go at once."""
    assert run_ranks(two_replicas, 2, False)[0].early == [0, 0]
    assert run_ranks(without_idle, 2)[0] == 3


def without_idle(rank: int) -> int:
    zero_settings.MESSAGE = 16
    model = Model()
    summed = reduction.GradientReduction(model.layers.parameters(), Mesh(MeshSizes(dp=2)).axis("replica"))
    summed.expect(1)
    model(inputs(rank, 0, 0)).backward()
    early = summed._sent
    summed.finish()
    return early
