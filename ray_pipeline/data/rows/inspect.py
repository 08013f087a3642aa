"""Packed rows for the eye: what is supervised, where documents meet, what is padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.text import Text

from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.data.rows.batch import IGNORE, Batch, required

SUPERVISED, CONTEXT, BOUNDARY, REJECTED = "bold green", "dim", "bold magenta", "bold red"


def render_rows(batch: Batch, tokenizer: ChatTokenizer) -> list[Text]:
    """One text per row. A token is supervised when the label of the token before it asks for it."""
    return [_render_row(batch, row, tokenizer) for row in range(len(batch))]


def render_pairs(batch: Batch, tokenizer: ChatTokenizer) -> list[Text]:
    """One text per pair of a PairRows batch: the prompt, the chosen and the rejected answer."""
    pairs, chosen = required(batch.extras.pair), batch.extras.chosen == 1
    out = []
    for pair in range(int(pairs.max()) + 1):
        [prompt, *good], [_, *bad] = (
            _runs(batch.tokens[place].tolist(), batch.labels[place].tolist(), tokenizer)
            for place in ((pairs == pair) & chosen, (pairs == pair) & ~chosen)
        )
        text = Text(f"\npair {pair}:\n").append(prompt[0], CONTEXT)
        for name, runs, style in (("chosen", good, SUPERVISED), ("rejected", bad, REJECTED)):
            text.append(f"\n{name}: ", BOUNDARY)
            for run, supervised in runs:
                text.append(run, style if supervised else CONTEXT)
        out.append(text)
    return out


def _runs(tokens: Sequence[int], labels: Sequence[int], tokenizer: ChatTokenizer) -> list[tuple[str, bool]]:
    """A document as (text, whether it is supervised), piece by piece."""
    supervised = [False] + [label != IGNORE for label in labels]
    whole = [*tokens, labels[-1]]  # the last label is a target that may never be an input
    pieces = itertools.groupby(zip(whole, supervised, strict=True), key=lambda pair: pair[1])
    texts = ((tokenizer.decode([token for token, _ in piece if token != IGNORE], keep_special=True), supervised)
             for supervised, piece in pieces)  # fmt: skip
    return [(text, supervised) for text, supervised in texts if text]


def _render_row(batch: Batch, row: int, tokenizer: ChatTokenizer) -> Text:
    # The last label is the row's last token: it is a target that is never an input.
    labels = batch.labels[row].tolist()
    tokens, documents = batch.tokens[row].tolist(), batch.doc_ids[row].tolist()
    supervised = [False] + [label != IGNORE for label in labels]
    if supervised[-1]:
        tokens, documents = [*tokens, labels[-1]], [*documents, documents[-1]]
    padding = len(tokens)
    if batch.real is not None and not bool(batch.real[row].all()):
        padding = int(batch.real[row].sum())
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
