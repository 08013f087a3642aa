"""Packed rows of answers, made by hand: what objectives are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from model.layers.loss import label_logprobs
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import IGNORE, Batch, join_rows, real_tokens
from tests.engine.test_parity import CONFIG

SEQ = 16
# (prompt, answer) lengths by row; a document takes one place less, as its last token is only ever a label.
ROWS = [[(2, 3), (3, 6)], [(5, 9)], [(2, 2), (1, 4), (3, 5)], [(4, 1), (6, 5)]] * 2
# A pair is two documents of one row; the last row holds two pairs.
PAIR_ROWS = [[(3, 4), (3, 5)], [(2, 6), (2, 2)], [(4, 3), (4, 6)], [(1, 3), (1, 4), (2, 2), (2, 3)]] * 2


def answers(rows: Sequence[Sequence[tuple[int, int]]], seed: int, seq_len: int = SEQ) -> Batch:
    """Random tokens in the given documents; padding at the end of a row is a document of its own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CONFIG.vocab_size, (len(rows), seq_len), generator=generator)
    labels = torch.full_like(tokens, IGNORE)
    doc_ids = torch.zeros_like(tokens)
    for row, documents in enumerate(rows):
        start = 0
        for number, (prompt, answer) in enumerate(documents):
            stop = start + prompt + answer - 1
            doc_ids[row, start:stop] = number
            labels[row, stop - answer : stop] = torch.randint(0, CONFIG.vocab_size, (answer,), generator=generator)
            start = stop
        doc_ids[row, start:] = len(documents)
    return Batch(tokens, labels, doc_ids, real=real_tokens(doc_ids, labels))


def by_document(batch: Batch, values: Tensor) -> Tensor:
    """One value per answer, row by row, spread over its document: [answers] -> [rows, seq]."""
    out = torch.zeros(batch.labels.shape)
    place = 0
    for row in range(len(batch)):
        for document in range(int(batch.doc_ids[row].max()) + 1):
            inside = batch.doc_ids[row] == document
            if bool((batch.labels[row, inside] != IGNORE).any()):
                out[row, inside] = values[place]
                place += 1
    return out


def count(rows: Sequence[Sequence[tuple[int, int]]]) -> int:
    return sum(len(row) for row in rows)


def rollouts(seed: int = 1, rows: Sequence[Sequence[tuple[int, int]]] = ROWS) -> Batch:
    """What GRPO trains on; log-probabilities about those of a model that knows nothing."""
    batch = answers(rows, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    batch.extras.advantages = by_document(batch, torch.randn(count(rows), generator=generator))
    for name in ("old_logprobs", "ref_logprobs"):
        values = -4.2 + 0.8 * torch.rand(batch.labels.shape, generator=generator)
        setattr(batch.extras, name, values)
    noise = 0.4 * torch.rand(batch.labels.shape, generator=generator) - 0.2
    batch.extras.sampler_logprobs = batch.extras.old_logprobs + noise
    return batch


def near(batch: Batch, model: Transformer, hidden: Tensor, shift: float, seed: int = 6) -> Batch:
    """The same with log-probabilities that differ from the model's by up to `shift`, the sampler's by twice that."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = label_logprobs(hidden, model.lm_head, batch.labels).detach()
    for name in ("old_logprobs", "ref_logprobs"):
        noise = shift * (2 * torch.rand(logprobs.shape, generator=generator) - 1)
        setattr(batch.extras, name, (logprobs + noise) * (batch.labels != IGNORE))
    noise = shift * (2 * torch.rand(logprobs.shape, generator=generator) - 1) * (batch.labels != IGNORE)
    batch.extras.sampler_logprobs = batch.extras.old_logprobs + noise
    return batch


def pairs(seed: int = 1, rows: Sequence[Sequence[tuple[int, int]]] = PAIR_ROWS) -> Batch:
    """What DPO trains on: documents 2n and 2n + 1 of a row are a pair, and which is chosen alternates."""
    batch = rollouts(seed, rows)
    pair, chosen = torch.full(batch.labels.shape, -1.0), torch.zeros(batch.labels.shape)
    number = 0
    for row, documents in enumerate(rows):
        for document in range(len(documents)):
            inside = batch.doc_ids[row] == document
            pair[row, inside] = float(number + document // 2)
            chosen[row, inside] = float((document + number) % 2 == 0)
        number += len(documents) // 2
    batch.extras.pair, batch.extras.chosen = pair, chosen
    return batch


def unpacked(batch: Batch, keep: int = 1) -> Batch:
    """Every `keep` documents in a row of their own, at the places they had; all else of it is padding."""
    parts = []
    for row in range(len(batch)):
        whole = batch.rows(row, row + 1)
        for first in range(0, int(batch.doc_ids[row].max()) + 1, keep):
            inside = (whole.doc_ids >= first) & (whole.doc_ids < first + keep)
            if not bool((whole.labels[inside] != IGNORE).any()):
                continue
            extras = whole.extras.each(partial(_where, inside))
            if extras.pair is not None:
                extras.pair = extras.pair.masked_fill(~inside, -1.0)
            labels = whole.labels.masked_fill(~inside, IGNORE)
            parts.append(Batch(whole.tokens, labels, whole.doc_ids, extras, real=inside))
    return join_rows(parts)


def _where(inside: Tensor, value: Tensor) -> Tensor:
    return value * (inside if value.dim() == 2 else inside.unsqueeze(-1))


def at_the_start(batch: Batch) -> Batch:
    """Rows of `unpacked` with their documents moved to the front, and padding of one document behind them."""
    rows = []
    for row in range(len(batch)):
        one = batch.rows(row, row + 1)
        kept = one.doc_ids[0, one.labels[0] != IGNORE]
        inside = (one.doc_ids >= kept.min()) & (one.doc_ids <= kept.max())
        shift = -int(inside.int().argmax())
        extras = one.extras.each(lambda value, shift=shift: value.roll(shift, 1))
        doc_ids = (one.doc_ids - kept.min()).masked_fill(~inside, len(kept)).roll(shift, 1)
        labels = one.labels.roll(shift, 1)
        rows.append(Batch(one.tokens.roll(shift, 1), labels, doc_ids, extras, real=inside.roll(shift, 1)))
    return join_rows(rows)
