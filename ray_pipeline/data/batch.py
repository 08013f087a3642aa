"""What the engine trains on: rows of packed documents as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.loss import IGNORE

__all__ = ["IGNORE", "Batch"]


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
    """

    tokens: Tensor
    labels: Tensor
    doc_ids: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    window: slice | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def local(self, values: Tensor) -> Tensor:
        """This rank's positions of a per-token tensor: [rows, seq_len, ...] -> [rows, seq_len / sp, ...]."""
        return values if self.window is None else values[:, self.window]

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) of every tensor."""
        extras = {k: v[start:stop] for k, v in self.extras.items()}
        return replace(
            self, tokens=self.tokens[start:stop], labels=self.labels[start:stop], doc_ids=self.doc_ids[start:stop],
            extras=extras,
        )  # fmt: skip

    def pad_rows(self, count: int) -> Batch:
        """At least `count` rows: added ones repeat the last row without labels and extras, so they train nothing.

        Extras of whole numbers are ids; -1 is none.
        """
        missing = count - len(self)
        if missing <= 0:
            return self

        def grow(tensor: Tensor, fill: float | None) -> Tensor:
            last = tensor[-1:].expand(missing, *tensor.shape[1:])
            return torch.cat([tensor, last if fill is None else torch.full_like(last, fill)])

        extras = {k: grow(v, 0.0 if v.is_floating_point() else -1) for k, v in self.extras.items()}
        return Batch(grow(self.tokens, None), grow(self.labels, IGNORE), grow(self.doc_ids, None), extras, self.window)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        extras = {k: v.to(device) for k, v in self.extras.items()}
        return Batch(self.tokens.to(device), self.labels.to(device), self.doc_ids.to(device), extras, self.window)
