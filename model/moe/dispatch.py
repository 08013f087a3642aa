"""Tokens on their way to the ranks that hold their experts, and what those made of them on its way back.

A token goes once to every node that has one of its experts, to the rank with the sender's place there, and from that
once to every rank of the node that needs it (DeepSeek-V3, arXiv:2412.19437, §3.2.2). Its experts and their weights go
with it, so a rank sums up its experts' results, and a node those of its ranks, before one row goes back. No token is
dropped. Tensor-parallel ranks, which all have the same tokens, send a share of them each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.rows import Plan, collect, plan_rows, spread
from model.layers.fp8 import Quantised, quantise_tiles
from model.parallel.collectives import Arrivals, Axis, collective, exchange_rows


class Tokens(NamedTuple):
    """x [tokens, hidden]; experts [tokens, k], by number, with one number more for none; their weights [tokens, k]."""

    x: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Hop:
    """One exchange on the way.

    Attributes:
        held: experts of one place; the axis's places follow each other. copies: ranks of a place, which need the same
            tokens, as each holds a slice of its experts.
    """

    axis: Axis
    held: int
    copies: int = 1


@dataclass(frozen=True)
class _Route:
    """What one exchange sends: the rows that `plan` makes of tokens, so many to and from each rank.

    Attributes:
        fp8: what goes there goes in E4M3, tokens and in backward the gradients of their results; what comes back, as it
            is.
    """

    plan: Plan
    sent: list[int]
    received: list[int]
    axis: Axis
    fp8: bool = False

    def there(self, rows: Tensor, arrivals: Arrivals | None = None) -> Tensor:
        message = _coded(rows) if self.fp8 else rows

        def receive() -> Tensor:
            return exchange_rows(message, self.received, self.sent, self.axis)

        arrived = receive() if arrivals is None else arrivals.keep(receive)
        return _decoded(arrived, rows) if self.fp8 else arrived

    def back(self, rows: Tensor) -> Tensor:
        return exchange_rows(rows, self.sent, self.received, self.axis)


def _coded(rows: Tensor) -> Tensor:
    """Bytes [rows, width + 4 * ceil(width / 128)]: each value in E4M3, then the scale of every tile."""
    tiles = quantise_tiles(rows)
    return torch.cat([tiles.values.view(torch.uint8), tiles.scale.contiguous().view(torch.uint8)], 1)


def _decoded(message: Tensor, like: Tensor) -> Tensor:
    """What `_coded` made such a message of: exactly, if it was rounded to E4M3 before."""
    values, scale = (part.contiguous() for part in message.tensor_split([like.shape[1]], 1))
    return Quantised(values.view(torch.float8_e4m3fn), scale.view(torch.float32)).dequantise().to(like.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.forward = forward
        return quantise_tiles(x).dequantise().to(x.dtype) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad if ctx.forward else quantise_tiles(grad).dequantise().to(grad.dtype), None


def round_tokens(x: Tensor) -> Tensor:
    """To E4M3 with a scale for each 1 x 128 tile (arXiv:2412.19437, §3.3.3): what experts read; gradients as they are.

    Done on every rank, whether it sends them or not: no layout changes a result by it, and no hop rounds again.
    """
    return _Rounded.apply(x, True)


def round_gradients(out: Tensor) -> Tensor:
    """The same for the gradient of what experts made."""
    return _Rounded.apply(out, False)


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route, arrivals: Arrivals | None) -> Tensor:
        ctx.route = route
        return route.there(rows, arrivals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.back(grads[0]), None, None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route, arrivals: Arrivals | None) -> Tensor:
        ctx.route = route
        return route.back(rows) if arrivals is None else arrivals.keep(lambda: route.back(rows), values=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.there(grads[0]), None, None


def through(
    hops: Sequence[Hop],
    tokens: Tokens,
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    arrivals: Arrivals | None,
    fp8: bool = False,
) -> Tensor:
    """Weighted sum of every token's experts, computed where the hops lead: [tokens, hidden].

    Args:
        tokens: of this rank; their experts are numbered through all places of the first hop.
        compute: the same of tokens that have arrived, whose experts are numbered from 0 on this rank.
        arrivals: of a layer that runs again in backward. What came over the first hop, the widest, is kept for that;
            over the second one, within a node, rows come again.
        fp8: tokens went through `round_tokens`, and what comes back goes through `round_gradients`: rows in 8 bits.
    """
    routes, kept = list[_Route](), arrivals
    for hop in hops:
        if hop.axis.size > 1:
            tokens, route = _send(hop, tokens, arrivals, kept, fp8)
            routes, kept = [route, *routes], None
    made = compute(*tokens)
    for route in routes:
        made = collect(_Back.apply(made, route, arrivals), route.plan)
    return made


def _send(
    hop: Hop, tokens: Tokens, arrivals: Arrivals | None, kept: Arrivals | None, fp8: bool
) -> tuple[Tokens, _Route]:
    """Tokens as they arrive at the other side, and the way they came."""
    plan, rank = _plan(hop, tokens.experts)
    counts = torch.stack([plan.counts, _exchanged_counts(plan.counts, hop.axis, arrivals)])
    sent, received = counts.tolist()
    route = _Route(plan, sent, received, hop.axis)
    coded = replace(route, fp8=fp8)
    experts = tokens.experts.index_select(0, plan.source) - (rank // hop.copies * hop.held).unsqueeze(1)
    experts = torch.where((experts < 0) | (experts > hop.held), hop.held, experts)
    experts, order = experts.sort(dim=1, stable=True)  # those of the place first, then what is none
    experts, order = (given[:, : hop.held] for given in (experts, order))  # no token has more there
    weights = spread(tokens.weights, plan).gather(1, order).masked_fill(experts == hop.held, 0.0)
    arrived = _There.apply(experts.to(torch.int32), route, arrivals).long()
    x = _There.apply(spread(tokens.x, plan), coded, kept)
    return Tokens(x, arrived, _There.apply(weights, route, arrivals)), coded


def _exchanged_counts(counts: Tensor, axis: Axis, arrivals: Arrivals | None) -> Tensor:
    """[ranks] rows for each of them -> rows from each of them."""

    def receive() -> Tensor:
        arriving = torch.empty_like(counts)
        with collective(axis, "all-to-all"):
            dist.all_to_all_single(arriving, counts, group=axis.group)
        return arriving

    return receive() if arrivals is None else arrivals.keep(receive)


def _plan(hop: Hop, experts: Tensor) -> tuple[Plan, Tensor]:
    """A row for every token and rank that needs it, sorted by rank, then token; and the rank of every row."""
    ranks, (tokens, k) = hop.axis.size, experts.shape
    places = ranks // hop.copies
    wanted = torch.zeros(tokens, places + 1, dtype=torch.bool, device=experts.device)
    wanted = wanted.scatter_(1, experts // hop.held, True)[:, :places].repeat_interleave(hop.copies, 1)
    by_rank = wanted.t()
    rank, source = by_rank.nonzero(as_tuple=True)
    place = (by_rank.flatten().cumsum(0) - 1).view(ranks, tokens).t().clamp(min=0)
    first = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, : min(ranks, k * hop.copies)]
    return Plan(source, place.gather(1, first), wanted.sum(0), wanted.gather(1, first)), rank


def plan_present(experts: Tensor, held: int, multiple: int) -> Plan:
    """As `plan_rows` for `held` experts, where that number stands for none: all those share one row of padding, whose
    weight is zero, with the last expert."""
    plan = plan_rows(experts, held + 1, multiple)
    counts = plan.counts[:held].clone()
    rows = int(counts.sum())
    spare = min(multiple, len(plan.source) - rows)
    counts[-1] += spare
    return Plan(plan.source[: rows + spare], plan.place.clamp(max=rows), counts)
