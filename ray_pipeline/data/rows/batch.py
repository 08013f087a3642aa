"""What the engine trains on: rows of packed documents as tensors, and which of their places are padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.layers.loss import IGNORE, tokens_ahead

__all__ = ["IGNORE", "Batch", "Extras", "join_rows", "real_tokens", "required"]


@dataclass
class Extras:
    """What objectives and mechanisms read of every token besides its id, each [rows, seq_len] unless said otherwise.

    None: the batch has no such values. Those that are log-probabilities are of the labels, zero where there is none.

    Attributes:
        row_seed: int64, of the random numbers of training, the same along a row. noise_scale: of the embeddings'.
        pair, chosen: number of the preference pair within the batch, -1 for none; 1 in its chosen answer, else 0.
        advantages: of a sampled token. trained: 0 for tokens of the answer that nothing is learned from.
        sampler_logprobs, old_logprobs, ref_logprobs: by the sampler, by the policy at the rollout, by the reference.
        routing: int64 [rows, seq_len, columns], the experts to use (`model.moe.replay`).
        teacher_hidden: [rows, seq_len, width], the teacher's states after its final norm.
        teacher_topk_ids, teacher_topk_logprobs: [rows, seq_len, k], the teacher's likeliest next tokens.
    """

    row_seed: Tensor | None = None
    noise_scale: Tensor | None = None
    pair: Tensor | None = None
    chosen: Tensor | None = None
    advantages: Tensor | None = None
    trained: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    routing: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_topk_ids: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that the batch has, by name."""
        return {name: values for name, values in vars(self).items() if values is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Extras:
        """Every tensor changed in the same way."""
        return Extras(**{name: change(values) for name, values in self.given().items()})


def required(values: Tensor | None) -> Tensor:
    """Values of a batch without which an objective cannot be computed."""
    assert values is not None, "the batch lacks what this objective reads: its source did not add it"
    return values


@dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: [rows, seq_len] int64.
        labels: [rows, seq_len] int64; the next token of the same document, or IGNORE.
        doc_ids: [rows, seq_len] int64; document index within the row, non-decreasing; attention never crosses it.
        extras: per-token values that some objectives need (advantages, log-probabilities).
        window: the part of each row that this rank computes under sequence parallelism; None for all of it. The
            tensors hold whole rows all the same: attention needs every document, labels reach over the border.
        real: [rows, seq_len] bool, False for padding: the empty end of a row, and rows that are there to fill up a
            layout. Padding is computed and counts in nothing: no loss, no expert's load, no denominator, no figure.
            None: every place holds a token of a document.
        start: where these are one replica's rows alone, the index of the first within the global batch; None: they are
            the global batch.
    """

    tokens: Tensor
    labels: Tensor
    doc_ids: Tensor
    extras: Extras = field(default_factory=Extras)
    window: slice | None = None
    real: Tensor | None = None
    start: int | None = None

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
        return self.each(lambda tensor: tensor[start:stop])

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

        extras = self.extras.each(lambda values: grow(values, 0.0 if values.is_floating_point() else -1))
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.real is None else self.real
        return Batch(
            grow(self.tokens, None), grow(self.labels, IGNORE), grow(self.doc_ids, None), extras, self.window,
            grow(real, False), self.start,
        )  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor changed in the same way."""
        real = None if self.real is None else change(self.real)
        return replace(
            self, tokens=change(self.tokens), labels=change(self.labels), doc_ids=change(self.doc_ids),
            extras=self.extras.each(change), real=real,
        )  # fmt: skip


def join_rows(parts: Sequence[Batch]) -> Batch:
    """The rows of all parts, one after another; parts have the same extras, and none a window."""
    tokens, labels, doc_ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "labels", "doc_ids")
    )
    real = None
    if any(part.real is not None for part in parts):
        real = torch.cat([torch.ones_like(p.tokens, dtype=torch.bool) if p.real is None else p.real for p in parts])
    given = [part.extras.given() for part in parts]
    extras = Extras(**{name: torch.cat([one[name] for one in given]) for name in given[0]})
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
