"""Moving tokens to the rows where experts read them and back: gathers in both directions, forward and backward.

Autograd would turn the backward of a gather into an accumulating scatter, several times slower than the gather that
undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Which row each choice of a token is computed in.

    Attributes:
        source: [rows] the token that a row reads; a row of padding reads token 0.
        place: [tokens, k] the row of each token's k-th choice.
        counts: [experts] rows of each expert, padding included.
        present: [tokens, k] one for a choice that has a row, zero for one that is none; None: all have.
    """

    source: Tensor
    place: Tensor
    counts: Tensor
    present: Tensor | None = None


def _stable_order(numbers: Tensor) -> Tensor:
    """Stable argsort of int64 [n] below 2^15."""
    if numbers.device.type != "cpu":
        return numbers.argsort(stable=True)
    return torch.from_numpy(numbers.to(torch.int16).numpy().argsort(kind="stable"))  # by counting: ten times quicker


def plan_rows(chosen: Tensor, num_experts: int, multiple: int = 1) -> Plan:
    """Rows sorted by expert, each expert's rounded up to a multiple.

    Args:
        chosen: [tokens, k] the experts of each token.
    """
    flat, k = chosen.flatten(), chosen.shape[1]
    order = _stable_order(flat)
    counts = torch.bincount(flat, minlength=num_experts)
    places = torch.arange(flat.numel(), device=flat.device)
    source = order // k
    if multiple > 1:
        padded = (counts + multiple - 1) // multiple * multiple
        places = places + ((padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)).index_select(0, flat[order])
        source = source.new_zeros(int(padded.sum())).index_copy_(0, places, source)
        counts = padded
    place = torch.empty_like(order).index_copy_(0, order, places)
    return Plan(source, place.view(-1, k), counts)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor, present: Tensor | None) -> Tensor:
        ctx.save_for_backward(place, present)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_of_present(grads[0], *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, place: Tensor, present: Tensor | None) -> Tensor:
        ctx.save_for_backward(source)
        return _sum_of_present(rows, place, present)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (source,) = ctx.saved_tensors
        return grads[0].index_select(0, source), None, None, None


def _sum_of_present(rows: Tensor, place: Tensor, present: Tensor | None) -> Tensor:
    if present is None:
        return sum_of_choices(rows, place)
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[1])
    return sum_of_choices(rows, place, present.to(rows.dtype))


def sum_of_choices(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """[rows, width] -> [tokens, width], each row times its weight if there are any: [tokens, k]."""
    if place.shape[1] == 1 and weights is None:
        return rows.index_select(0, place.flatten())
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weights)  # gathers and adds in one pass


def spread(x: Tensor, plan: Plan) -> Tensor:
    """Every token into its rows: [tokens, width] -> [rows, width]. Gradients of rows of padding are lost."""
    return _Spread.apply(x, plan.source, plan.place, plan.present)


def collect(rows: Tensor, plan: Plan) -> Tensor:
    """Sum of every token's rows: [rows, width] -> [tokens, width].

    Rows of padding get the gradient of token 0: the caller makes sure that nothing comes of it.
    """
    return _Collect.apply(rows, plan.source, plan.place, plan.present)


def spread_scales(scales: Tensor, plan: Plan) -> Tensor:
    """[tokens, k] -> [rows, 1], zero for padding."""
    return scales.new_zeros(len(plan.source), 1).index_put((plan.place.flatten(),), scales.reshape(-1, 1))
