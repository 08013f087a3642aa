"""Text as every competitor reads it: one tokenizer, the same packed rows in the same order, the same held-out rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import row_order, rows_to_batch
from ray_pipeline.data.rows.packing import pack_documents
from ray_pipeline.data.shared.cleaning import clean_text, content_hash, validation_members
from ray_pipeline.data.sources.sources import BUILTIN, parse_source, read_documents
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError

HELD_OUT = 0.05  # of the documents; of tinyshakespeare 25,000 tokens


@dataclass(frozen=True)
class Rows:
    """Packed rows, each array [rows, seq_len + 1]."""

    tokens: NDArray[Any]
    segments: NDArray[Any]
    mask: NDArray[Any]

    def take(self, indices: list[int]) -> Batch:
        """These rows as a batch."""
        return rows_to_batch(self.tokens[indices], self.segments[indices], self.mask[indices])


@dataclass(frozen=True)
class Text:
    """A corpus cut into rows to train on and rows held out.

    Attributes:
        heldout_bytes: of the held-out documents in UTF-8; each of their tokens but the first is a target once.
    """

    name: str
    vocab_size: int
    train: Rows
    heldout: Rows
    heldout_bytes: int

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The rows of a training step; a pure function of the seed and the step, as in PRETRAIN."""
        return self.train.take(row_order(len(self.train.tokens), seed, step, batch_size))

    def heldout_batches(self, batch_size: int) -> Iterator[Batch]:
        """All held-out rows."""
        count = len(self.heldout.tokens)
        for start in range(0, count, batch_size):
            yield self.heldout.take(list(range(start, min(start + batch_size, count))))


def read_text(source: str, *, vocab_size: int, seq_len: int, documents: int) -> Text:
    """Read, clean, split by hash, tokenise with a BPE trained on the training side, and pack, as DATA_PREP does it.

    Args:
        source: "builtin", or a file as `--data` takes it. documents: read at most.
    Raises:
        UserError: there is no such file, or too little in it.
    """
    if source == BUILTIN:
        name, read = BUILTIN, (document_at(0, index) for index in range(documents))
    else:
        given = parse_source(source)
        if given.kind != "file":
            raise UserError(f"{source}: give a file of text, or {BUILTIN}.")
        path = Path(given.location)
        name, read = f"{path.parent.name}/{path.name}", read_documents(given, documents)
    texts = list(dict.fromkeys(text for document in read if (text := clean_text(document))))
    if len(texts) < 2:
        raise UserError(f"{source}: {len(texts)} document(s); at least two are needed, one of them to be held out.")
    held = validation_members([content_hash(text) for text in texts], HELD_OUT)
    sides = [[text for text, out in zip(texts, held, strict=True) if out is side] for side in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_trained(train_bpe(sides[0], vocab_size), Path(folder))
    train, heldout = (_packed(tokenizer, side, seq_len) for side in sides)
    return Text(name, vocab_size, train, heldout, sum(len(text.encode()) for text in sides[1]))


def _packed(tokenizer: ChatTokenizer, texts: list[str], seq_len: int) -> Rows:
    ids = ([tokenizer.bos_id, *document, tokenizer.eos_id] for document in tokenizer.encode_batch(texts))
    columns = zip(*pack_documents(ids, seq_len, tokenizer.pad_id), strict=True)
    return Rows(*(np.stack(column) for column in columns))
