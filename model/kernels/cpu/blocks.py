"""Which keys meet which queries when causal attention is computed part by part.

Little of what the mask hides is computed at all: nothing far above the diagonal, and in packed rows little or nothing
of other documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.limits import BLOCK, CALL, MASKED, PIECE, WORTH_CHOOSING

LOWEST = torch.finfo(torch.float32).min  # finite, as 0 * inf is no number

Keys = slice | Tensor


class Part(NamedTuple):
    """Queries of some rows, and the keys that they meet; `causal` where nothing is hidden but what comes later."""

    rows: slice
    queries: slice
    keys: Keys
    causal: bool


def document_parts(mask: Tensor | None, batch: int, seq: int, *, alone: bool) -> list[Part]:
    """Blocks of all rows at once, from the first document that one of them is in to their own end.

    Args:
        mask: a document mask, or None for rows of one document.
        alone: every document by itself, where that takes less time.
    """
    every = slice(0, batch)
    starts = torch.zeros(1, seq, dtype=torch.long) if mask is None else document_starts(mask)
    if not starts.any():
        return [Part(every, queries, slice(0, queries.stop), True) for queries in _cut(0, seq, BLOCK)]
    firsts = starts[:, ::BLOCK].amin(0).tolist()
    together = [
        Part(every, queries, slice(first, queries.stop), False)
        for queries, first in zip(_cut(0, seq, BLOCK), firsts, strict=True)
    ]
    return min(together, _apart(starts, batch), key=_pairs) if alone else together


def _apart(starts: Tensor, batch: int) -> list[Part]:
    """Documents one after another, long ones in pieces."""
    parts, seq = [], starts.shape[1]
    for row, begins in enumerate(starts == torch.arange(seq)):
        rows = slice(row, row + 1) if len(starts) > 1 else slice(0, batch)
        edges = [*begins.nonzero().squeeze(1).tolist(), seq]
        for start, stop in pairwise(edges):
            parts += [Part(rows, queries, slice(start, queries.stop), True) for queries in _cut(start, stop, PIECE)]
    return parts


def document_starts(mask: Tensor) -> Tensor:
    """Where each query's document begins: [batch, seq]; a query that does not see the token before it begins one."""
    index = torch.arange(mask.shape[-1])
    begins = torch.ones(mask.shape[0], mask.shape[-1], dtype=torch.bool)
    begins[:, 1:] = ~mask[:, 0].diagonal(-1, 1, 2)
    return torch.where(begins, index, 0).cummax(1).values


def visible_parts(mask: Tensor, batch: int, window: int | None) -> list[Part]:
    """Blocks and the keys they meet: from the first that one of its queries sees to their own end; with a window those
    before it one by one."""
    # Of bytes, batch first: a hundred times faster than `any` over all of it.
    seen = mask.view(torch.uint8).amax(0)[0]
    parts = []
    for queries in _cut(0, mask.shape[-1], BLOCK):
        start, stop = queries.start, queries.stop
        reach = 0 if window is None else max(0, start - window + 1)
        if reach < WORTH_CHOOSING:
            keys: Keys = slice(int(seen[queries, :stop].amax(0).argmax()), stop)
        else:
            far = seen[queries, :reach].amax(0).nonzero().squeeze(1)
            keys = torch.cat([far, torch.arange(reach, stop)])
        parts.append(Part(slice(0, batch), queries, keys, False))
    return parts


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _pairs(parts: Sequence[Part]) -> float:
    """What parts cost whose keys are slices, in pairs of a query and a key."""

    def length(s: Any) -> int:
        return s.stop - s.start

    return sum(length(p.rows) * length(p.queries) * length(p.keys) * (1 if p.causal else MASKED) + CALL for p in parts)


def hide(scores: Tensor, mask: Tensor | None, part: Part) -> None:
    """In place: scores [rows, heads, queries, keys], fp32, with what its query does not see as low as can be."""
    if part.causal:  # and its last key is its last query
        size = scores.shape[2]
        scores[..., -size:].add_(torch.full((size, size), LOWEST).triu_(1))
    else:
        scores += bias_of(mask, part)


def bias_of(mask: Tensor | None, part: Part) -> Tensor:
    """What hides a key when it is added to its score: fp32 [rows or 1, 1, queries, keys]."""
    rows, queries, keys, causal = part
    if causal:
        assert isinstance(keys, slice)
        ones = torch.ones(queries.stop - queries.start, keys.stop - keys.start, dtype=torch.uint8)
        visible = ones.tril(queries.start - keys.start)[None, None]
    else:
        assert mask is not None
        visible = mask[rows if len(mask) > 1 else slice(None), :, queries, keys].view(torch.uint8)
    return visible.float().sub_(1.0).mul_(-LOWEST)


def add_rows(total: Tensor | None, rows: slice, keys: Keys, values: Tensor, like: Tensor) -> Tensor:
    """Add to some keys of some rows of `total` [rows, ..., seq, dim], which is None before the first values.

    Args:
        like: of the shape that `total` has.
    """
    if total is None:
        if isinstance(keys, slice) and values.shape == like.shape:
            return values
        total = torch.zeros_like(like)
    if isinstance(keys, slice):
        total[rows][..., keys, :].add_(values)
    else:
        total[rows].index_add_(-2, keys, values)
    return total
