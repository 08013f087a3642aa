"""What the engine trains on: rows of packed documents as tensors, and which of their places are padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.layers.loss import IGNORE, tokens_ahead

__all__ = ["IGNORE", "Batch", "join_rows", "real_tokens"]


@dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: [rows, seq_len] int64.
        labels: [rows, seq_len] int64; the next token of the same document, or IGNORE.
        doc_ids: [rows, seq_len] int64; document index within the row, non-decreasing; attention never crosses it.
        extras: per-token values an objective needs (advantages, logprobs), each [rows, seq_len] or [rows, seq_len, k].
        window: the part of each row that this rank computes under sequence parallelism; None for all of it. The
            tensors hold whole rows all the same: attention needs every document, labels reach over the border.
        real: [rows, seq_len] bool, False for padding: the empty end of a row, and rows that are there to fill up a
            layout. Padding is computed and counts in nothing: no loss, no expert's load, no denominator, no figure.
            None: every place holds a token of a document.
    """

    tokens: Tensor
    labels: Tensor
    doc_ids: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    window: slice | None = None
    real: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def tokens_ahead(self, depth: int) -> int:
        """Tokens whose document goes on for `depth` places more: what an MTP module of that depth learns from.

        With depth 0, all tokens but padding.
        """
        return int(tokens_ahead(self.doc_ids, self.real, depth).sum())

    def local(self, values: Tensor) -> Tensor:
        """This rank's positions of a per-token tensor: [rows, seq_len, ...] -> [rows, seq_len / sp, ...]."""
        return values if self.window is None else values[:, self.window]

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) of every tensor."""
        return self._each(lambda tensor: tensor[start:stop])

    def pad_rows(self, count: int) -> Batch:
        """At least `count` rows: added ones repeat the last row's tokens, without labels and extras, and are padding.

        Extras of whole numbers are ids; -1 is none.
        """
        missing = count - len(self)
        if missing <= 0:
            return self

        def grow(tensor: Tensor, fill: float | None) -> Tensor:
            last = tensor[-1:].expand(missing, *tensor.shape[1:])
            return torch.cat([tensor, last if fill is None else torch.full_like(last, fill)])

        extras = {k: grow(v, 0.0 if v.is_floating_point() else -1) for k, v in self.extras.items()}
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.real is None else self.real
        return Batch(
            grow(self.tokens, None), grow(self.labels, IGNORE), grow(self.doc_ids, None), extras, self.window,
            grow(real, False),
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor changed in the same way."""
        extras = {name: change(values) for name, values in self.extras.items()}
        real = None if self.real is None else change(self.real)
        return replace(
            self, tokens=change(self.tokens), labels=change(self.labels), doc_ids=change(self.doc_ids), extras=extras,
            real=real,
        )  # fmt: skip


def join_rows(parts: Sequence[Batch]) -> Batch:
    """The rows of all parts, one after another; parts have the same extras, and none a window."""
    tokens, labels, doc_ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "labels", "doc_ids")
    )
    real = None
    if any(part.real is not None for part in parts):
        real = torch.cat([torch.ones_like(p.tokens, dtype=torch.bool) if p.real is None else p.real for p in parts])
    extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
    return Batch(tokens, labels, doc_ids, extras, real=real)


def real_tokens(doc_ids: Tensor, labels: Tensor) -> Tensor:
    """Which places of packed rows hold tokens of documents: all but a last document without a label.

    Packers give the empty end of a row a number of its own, and place no document that has no label.

    Args:
        doc_ids, labels: [rows, seq_len].
    Returns:
        bool, same shape.
    """
    last = doc_ids == doc_ids[:, -1:]
    learns = (last & (labels != IGNORE)).any(1, keepdim=True)
    return ~last | learns
