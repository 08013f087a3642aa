"""What travels between ranks inside a layer, as differentiable functions over one axis of the mesh.

Tensor parallelism uses Megatron's conjugate pair (arXiv:1909.08053): `copy_to` and `reduce_from`. Sequence
parallelism exchanges heads for positions (Ulysses, arXiv:2309.14509); experts get their rows by an uneven all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """My group of ranks along one axis.

    Attributes:
        ranks: global ranks. index: my place among them. group: None where I am alone.
    """

    name: str = "none"
    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)


LOCAL = Axis()  # an axis that is not split


class CollectiveFailed(RuntimeError):
    """A message between ranks did not arrive: `axis` and `operation` tell which."""

    def __init__(self, axis: str, operation: str, cause: str):
        super().__init__(f"{operation} along {axis}: {cause}")
        self.axis, self.operation, self.cause = axis, operation, cause


@contextmanager
def collective(axis: Axis, operation: str) -> Iterator[None]:
    """Names the axis in the error of a collective that timed out or lost a peer.

    Raises:
        CollectiveFailed: from torch.distributed's RuntimeError.
    """
    try:
        yield
    except CollectiveFailed:
        raise
    except RuntimeError as error:
        raise CollectiveFailed(axis.name, operation, str(error).strip().splitlines()[0]) from error


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis; not differentiable."""
    if axis.size > 1:
        with collective(axis, "all-reduce"):
            dist.all_reduce(x, op=op, group=axis.group)
    return x


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """Slices of the last dimension from all ranks of the axis, in their order; not differentiable."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    with collective(axis, "all-gather"):
        dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, -1)


class Arrivals:
    """What other ranks sent in a forward pass, for the same pass in backward, which then asks them for nothing."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._again: Iterator[Tensor] | None = None

    def again(self) -> Arrivals:
        """Start a repetition: what was kept is given out in the same order."""
        self._again = iter(self._kept)
        return self

    def keep(self, receive: Callable[[], Tensor], *, values: bool = True) -> Tensor:
        """What `receive` gives, the first time. Without `values` zeros after that: nothing that is kept reads them."""
        if self._again is not None:
            return next(self._again).detach()
        out = receive()
        self._kept.append(out.detach() if values else out.new_zeros(1).expand_as(out))
        return out


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
        ctx.received, ctx.sent, ctx.axis = received, sent, axis
        return exchange_rows(x, received, sent, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(grads[0], ctx.sent, ctx.received, ctx.axis), None, None, None


def exchange_rows(x: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
    """As `all_to_all_rows`, for an axis that is split; not differentiable."""
    out = x.new_empty(sum(received), *x.shape[1:])
    with collective(axis, "all-to-all"):
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region whose weights are split over `axis`: identity forward, gradients summed backward."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave such a region: partial results summed forward, identity backward."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def all_to_all_rows(x: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
    """Send `sent[i]` leading rows of x to the axis's i-th rank and get `received[i]` rows from it, in rank order."""
    return x if axis.size == 1 else _AllToAll.apply(x, received, sent, axis)


def heads_for_positions(x: Tensor, axis: Axis) -> Tensor:
    """[batch, seq / n, heads, width] -> [batch, seq, heads / n, width]: before attention under sequence parallelism."""
    if axis.size == 1:
        return x
    parts = torch.stack(x.chunk(axis.size, dim=2))
    return torch.cat(list(_equal_exchange(parts, axis)), dim=1)


def positions_for_heads(x: Tensor, axis: Axis) -> Tensor:
    """[batch, seq, heads / n, width] -> [batch, seq / n, heads, width]: after attention."""
    if axis.size == 1:
        return x
    parts = torch.stack(x.chunk(axis.size, dim=1))
    return torch.cat(list(_equal_exchange(parts, axis)), dim=2)


def _equal_exchange(parts: Tensor, axis: Axis) -> Tensor:
    each = [1] * axis.size
    return _AllToAll.apply(parts, each, each, axis)
