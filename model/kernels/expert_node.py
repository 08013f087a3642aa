"""The routed experts' feed-forwards as one node of the graph: weight * down(silu(gate(x)) * up(x)), summed per token
(DeepSeek-V3, arXiv:2412.19437, eq. 12, its second sum).

How many experts are computed at a time is the device's matter (`Parts`). Tokens are gathered, and the inner activations
computed, once more in backward instead of being kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.rows import Plan, spread_scales, sum_of_choices
from model.kernels.swiglu import swiglu, swiglu_backward
from model.kernels.weight_gradients import BackwardSplit


class Parts(Protocol):
    """Rows that are computed at a time: those of one expert, or all of them.

    Attributes:
        writes_into: products write where they are told to; else they make a tensor of all rows.
    """

    writes_into: bool

    def rows(self, x: Tensor) -> list[Tensor]:
        """[rows, ...], one expert's after the other's -> that of each part."""
        ...

    def experts(self, weight: Tensor) -> list[Tensor]:
        """[experts, a, b] -> that of each part: [a, b] of its expert, or all of them."""
        ...

    def product(self, x: Tensor, matrix: Tensor, into: Tensor | None = None) -> Tensor:
        """A part's rows [rows, a] by its expert's matrix [a, b], or each one's by its own."""
        ...

    def transposed_product(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        """A part's weight gradient, grad^T x, as whatever dtype `into` is of."""
        ...


class _Rows:
    """A product's result [rows, width], made part by part."""

    def __init__(self, parts: Parts, like: Tensor, rows: int, width: int):
        self._parts = parts
        self.whole = like.new_empty(rows if parts.writes_into else 0, width)
        self._into = iter(parts.rows(self.whole))

    def add(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The next part."""
        made = self._parts.product(x, matrix, next(self._into))
        if not self._parts.writes_into:
            self.whole = made
        return made


class _WeightGradient:
    """That of a parameter [experts, a, b], part by part: at once, or later if the backward puts off what can wait."""

    def __init__(self, parts: Parts, owner: Tensor, cast: Tensor, needed: bool, split: BackwardSplit | None):
        self._parts, self._owner, self._shape, self._needed = parts, owner, cast.shape, needed
        self._queue = None if split is None else split.queue
        self._work: deque[tuple[Tensor, Tensor, Tensor | None]] = deque()
        self._whole: Tensor | None = None

    def add(self, grad: Tensor, x: Tensor, source: Tensor | None = None) -> None:
        """The next part: grad^T x, of the rows of x, or of those that `source` [rows] names."""
        if self._needed:
            self._work.append((grad, x, source))
            if self._queue is None:
                self._compute()

    def value(self) -> Tensor | None:
        """None where none is needed, or it is made later."""
        if self._needed and self._queue is not None:
            self._queue.add(self._owner, self._compute)
        return self._whole

    def _compute(self) -> Tensor:
        if self._whole is None:
            self._whole = torch.empty(self._shape, dtype=self._owner.dtype, device=self._owner.device)
            self._into = iter(self._parts.experts(self._whole))
        while self._work:
            grad, x, source = self._work.popleft()
            rows = x if source is None else x.index_select(0, source)
            self._parts.transposed_product(grad, rows, next(self._into))
        return self._whole


def _cast(parts: Parts, weight: Tensor, into: Tensor) -> Iterator[Tensor]:
    """Each part's matrices in the dtype of `into`, which holds them from then on, just before they are used."""
    for matrix, cast in zip(parts.experts(weight), parts.experts(into), strict=True):
        yield matrix if into is weight else cast.copy_(matrix)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        plan: Plan,
        parts: Parts,
        split: BackwardSplit | None,
    ) -> Tensor:
        wide, tall = (w if w.dtype == x.dtype else torch.empty_like(w, dtype=x.dtype) for w in (gate_up, down))
        rows = len(plan.source)
        inner, out = _Rows(parts, x, rows, gate_up.shape[1]), _Rows(parts, x, rows, down.shape[1])
        each = parts.rows(plan.source), _cast(parts, gate_up, wide), _cast(parts, down, tall)
        for source, first, second in zip(*each, strict=True):
            both = inner.add(x.index_select(0, source), first.mT)
            out.add(swiglu(both), second.mT)
        scales = spread_scales(weights, plan)
        ctx.save_for_backward(x, wide, tall, scales, inner.whole, plan.source, plan.place)
        ctx.parts, ctx.owners, ctx.split = parts, (gate_up, down), split
        return sum_of_choices(out.whole, plan.place, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, wide, tall, scales, inner, sources, place = ctx.saved_tensors
        parts = ctx.parts
        need_x, need_wide, need_tall, *_ = ctx.needs_input_grad
        dwide = _WeightGradient(parts, ctx.owners[0], wide, need_wide, ctx.split)
        dtall = _WeightGradient(parts, ctx.owners[1], tall, need_tall, ctx.split)
        dx, dscales = _Rows(parts, x, len(sources), x.shape[1]), torch.empty_like(scales)
        rows = [parts.rows(t) for t in (sources, scales, inner, dscales)]
        for source, scale, both, dscale, first, second in zip(
            *rows, parts.experts(wide), parts.experts(tall), strict=True
        ):
            grad = grads[0].index_select(0, source)
            made, dboth, of_scale = swiglu_backward(both, scale, parts.product(grad, second))
            dscale.copy_(of_scale)
            dtall.add(grad, made)
            dwide.add(dboth, x, source)
            if need_x:
                dx.add(dboth, first)
        tokens = sum_of_choices(dx.whole, place) if need_x else None
        return tokens, dwide.value(), dtall.value(), dscales.squeeze(1)[place], None, None, None


def feed_forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    plan: Plan,
    parts: Parts,
    split: BackwardSplit | None = None,
) -> Tensor:
    """As `model.kernels.plain.experts`, part by part. `gate_up` and `down` are parameters."""
    return _FeedForward.apply(x, gate_up, down, weights.to(x.dtype), plan, parts, split)
