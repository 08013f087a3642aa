"""Documents into rows of equal length. Arrays only: no files, no tokenizer.

A row holds seq_len + 1 tokens, so that seq_len inputs have their next token. Segment ids number the documents within a
row; padding is a segment of its own, never a target.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint32]


class Row(NamedTuple):
    """One packed row.

    Attributes:
        tokens: [seq_len + 1] uint32. segments: [seq_len + 1] uint16, non-decreasing.
        mask: [seq_len + 1] uint8, 1 where the token counts as a target of the token before it.
    """

    tokens: Tokens
    segments: NDArray[np.uint16]
    mask: NDArray[np.uint8]


@dataclass
class RowBuilder:
    """Fills one row, piece by piece."""

    seq_len: int
    pad_id: int
    used: int = 0
    segment: int = 0
    tokens: Tokens = field(init=False)
    segments: NDArray[np.uint16] = field(init=False)
    mask: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        width = self.seq_len + 1
        self.tokens = np.full(width, self.pad_id, np.uint32)
        self.segments = np.zeros(width, np.uint16)
        self.mask = np.zeros(width, np.uint8)

    @property
    def room(self) -> int:
        return self.seq_len + 1 - self.used

    def add(self, tokens: Tokens, mask: NDArray[np.uint8] | int) -> None:
        """Append a piece of one document; it must fit."""
        stop = self.used + len(tokens)
        self.tokens[self.used : stop] = tokens
        self.segments[self.used : stop] = self.segment
        self.mask[self.used : stop] = mask
        self.used, self.segment = stop, self.segment + 1

    def finish(self) -> Row:
        """The row, its rest padded."""
        self.segments[self.used :] = self.segment
        return Row(self.tokens, self.segments, self.mask)


class Position(NamedTuple):
    """Where packing goes on: the document, counted from the first that was given, and the first of its tokens."""

    document: int
    token: int


def pack_placed(
    documents: Iterable[tuple[int, Sequence[int] | Tokens]], seq_len: int, pad_id: int, start: int = 0
) -> Iterator[tuple[Row, int, Position]]:
    """Rows that hold documents of one source each, with their source and where packing goes on after them.

    A document that does not fit goes on in the next row, which repeats its last token as input. A lone slot at a
    row's end is left empty, as no target fits there. Documents of fewer than two tokens have no target and are skipped.

    Args:
        documents: (index of its source, ids), in order.
        start: the first document is packed from this token on; what an earlier pass had packed is not packed again.
    """
    row, held, number = RowBuilder(seq_len, pad_id), 0, -1
    for number, (source, document) in enumerate(documents):
        ids = np.asarray(document, np.uint32)
        if row.used and source != held:
            yield row.finish(), held, Position(number, start)
            row = RowBuilder(seq_len, pad_id)
        held = source
        while len(ids) - start >= 2:
            if row.room < 2:
                yield row.finish(), held, Position(number, start)
                row = RowBuilder(seq_len, pad_id)
            piece = ids[start : start + row.room]
            row.add(piece, 1)
            start += len(piece) - 1  # the last token is the next piece's first input
        start = 0
    if row.used:
        yield row.finish(), held, Position(number + 1, 0)


def pack_documents(documents: Iterable[Sequence[int] | Tokens], seq_len: int, pad_id: int) -> Iterator[Row]:
    """Pretraining rows: documents in the given order, each token but a document's first a target exactly once."""
    return (row for row, _, _ in pack_placed(((0, ids) for ids in documents), seq_len, pad_id))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`: best-fit decreasing (arXiv:2404.10830).

    Longest first, each into the fullest row that still takes it; ties go to the lower index, so the result depends on
    the lengths alone. Indices within a row keep their order.

    Raises:
        ValueError: a length is above `capacity` or below one.
    """
    rows: list[list[int]] = []
    # Rows by the room they have left; `rooms` holds the keys in use, sorted.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"length {length} of item {index} is not within 1..{capacity}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return [sorted(row) for row in rows]


def pack_conversations(
    conversations: Sequence[tuple[Sequence[int], Sequence[int]]], seq_len: int, pad_id: int
) -> tuple[list[Row], int]:
    """SFT rows by best fit; a conversation is never split.

    Args:
        conversations: (ids, mask) of each.
    Returns:
        The rows, and how many conversations were dropped for being longer than seq_len + 1.
    Raises:
        ValueError: a conversation has no supervised target (its first token cannot be one), or mask and ids differ in
            length.
    """
    kept = [(ids, mask) for ids, mask in conversations if len(ids) <= seq_len + 1]
    for ids, mask in kept:
        if len(ids) != len(mask) or not any(mask[1:]):
            raise ValueError(f"a conversation of {len(ids)} tokens has no supervised target in its mask of {len(mask)}")
    rows = []
    for group in best_fit([len(ids) for ids, _ in kept], seq_len + 1):
        row = RowBuilder(seq_len, pad_id)
        for index in group:
            ids, mask = kept[index]
            row.add(np.asarray(ids, np.uint32), np.asarray(mask, np.uint8))
        rows.append(row.finish())
    return rows, len(conversations) - len(kept)


def is_target(segments: NDArray[np.uint16], mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[..., seq_len]: which tokens behind the first are supervised: masked, with a predecessor in the same document.

    Args:
        segments, mask: [..., seq_len + 1].
    """
    return (segments[..., 1:] == segments[..., :-1]) & (mask[..., 1:] == 1)


def count_targets(row: Row) -> int:
    """Supervised targets of a row: masked tokens whose predecessor belongs to the same document."""
    return int(np.count_nonzero(is_target(row.segments, row.mask)))
