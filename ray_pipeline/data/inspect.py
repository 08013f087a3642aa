"""Packed rows for the eye: what is supervised, where documents meet, what is padding."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from ray_pipeline.data.batch import IGNORE, Batch
from ray_pipeline.data.tokenizer import ChatTokenizer

SUPERVISED, CONTEXT, BOUNDARY = "bold green", "dim", "bold magenta"


def render_rows(batch: Batch, tokenizer: ChatTokenizer) -> list[Text]:
    """One text per row. A token is supervised when the label of the token before it asks for it."""
    return [_render_row(batch, row, tokenizer) for row in range(len(batch))]


def _render_row(batch: Batch, row: int, tokenizer: ChatTokenizer) -> Text:
    # The last label is the row's last token: it is a target that is never an input.
    labels = batch.labels[row].tolist()
    tokens, documents = batch.tokens[row].tolist(), batch.doc_ids[row].tolist()
    supervised = [False] + [label != IGNORE for label in labels]
    if supervised[-1]:
        tokens, documents = [*tokens, labels[-1]], [*documents, documents[-1]]
    padding = _padding_start(documents, supervised)
    out = Text(f"\nrow {row}: {sum(supervised)} of {len(labels)} targets\n")
    # Runs of one style are decoded together: a character may be spelled with several tokens.
    start = 0
    for end in range(1, padding + 1):
        last = end == padding
        if not last and (documents[end], supervised[end]) == (documents[start], supervised[start]):
            continue
        text = tokenizer.decode(tokens[start:end], keep_special=True)
        out.append(text, SUPERVISED if supervised[start] else CONTEXT)
        if not last and documents[end] != documents[start]:
            out.append("│\n", BOUNDARY)
        start = end
    if padding < len(tokens):
        out.append(f"│ {len(tokens) - padding} × padding", BOUNDARY)
    return out


def _padding_start(documents: list[int], supervised: list[bool]) -> int:
    """Where the last segment begins if it is padding (nothing in it is supervised), else the row's length."""
    first = int(np.searchsorted(documents, documents[-1]))
    is_padding = first > 0 and not any(supervised[first : len(documents)])
    return first if is_padding else len(documents)
