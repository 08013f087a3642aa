"""Completions as packed rows to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.generate.decode import Completion
from ray_pipeline.data.rows.batch import IGNORE, Batch, Extras, required
from ray_pipeline.data.rows.packing import best_fit


def positions(completion: Completion) -> int:
    """Places it takes in a row: its last token is only ever a label."""
    return len(completion.prompt) + len(completion.tokens) - 1


def row_length(
    completions: Sequence[Completion], seq_len: int, model: ModelConfig, multiple: int, *, by_documents: bool
) -> int:
    """Length of rows that train these completions with the fewest operations: seq_len, a part of it, or just above the
    longest of them.

    Args:
        multiple: what a length must be a multiple of, unless it is seq_len.
        by_documents: attention computes documents alone (`model.kernels.cpu.blocks`); else whole rows.
    """
    lengths = [positions(c) for c in completions]
    longest = max(lengths, default=1)
    parts = {seq_len // count // multiple * multiple for count in range(2, seq_len // longest + 1)}
    mean = sum(lengths) // max(1, len(lengths))

    def operations(length: int) -> int:
        return len(best_fit(lengths, length)) * length * model.flops_per_token(mean if by_documents else length)

    shortest = min(-(-longest // multiple) * multiple, seq_len)
    return min(sorted({shortest, seq_len} | {part for part in parts if part > shortest}), key=operations)


def pack_completions(
    completions: Sequence[Completion],
    advantages: Tensor,
    seq_len: int,
    pad_id: int,
    *,
    trained: Sequence[bool] | None = None,
    multiple: int = 1,
) -> Batch:
    """Several completions to a row, with their prompts, kept apart by `doc_ids`.

    Args:
        advantages: [len(completions)].
        trained: which of them train anything; default: all. The others still count among the answers.
        multiple: rows are lengthened by padding to the next multiple of it. Which completions share a row stays the
            same: a balancing loss over sequences depends on that.
    Returns:
        Position t predicts token t + 1: labels are set where that token belongs to a completion and was not forced.
        Extras, zero where there is no label: "advantages", "sampler_logprobs", and with `trained` "trained". Where
        experts were recorded, "routing", int64 [rows, seq_len, MoE layers * experts per token], -1 for none.
    Raises:
        ValueError: for one longer than a row, or advantages of another length.
    """
    if len(advantages) != len(completions):
        raise ValueError(f"{len(advantages)} advantages for {len(completions)} completions: need one each")
    lengths = [positions(c) for c in completions]
    if max(lengths, default=0) > seq_len:
        raise ValueError(f"a completion takes {max(lengths)} positions: longer than seq_len={seq_len}")
    rows = best_fit(lengths, seq_len)
    batch = _empty(len(rows), -(-seq_len // multiple) * multiple, pad_id, completions)
    real = batch.real = torch.zeros_like(batch.tokens, dtype=torch.bool)
    if trained is not None:
        marks = batch.extras.trained = torch.zeros(batch.tokens.shape)
    for row, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members):
            place = slice(start, start + lengths[i])
            _write(batch.rows(row, row + 1), place, document, completions[i], float(advantages[i]))
            if trained is not None:
                marks[row, place] = (batch.labels[row, place] != IGNORE) * float(trained[i])
            start = place.stop
        batch.doc_ids[row, start:] = len(members)  # padding is a document of its own
        real[row, :start] = True
    return batch


def _empty(rows: int, seq_len: int, pad_id: int, completions: Sequence[Completion]) -> Batch:
    shape = (rows, seq_len)
    extras = Extras(advantages=torch.zeros(shape), sampler_logprobs=torch.zeros(shape))
    width = next((c.routing.shape[1] for c in completions if c.routing is not None), None)
    if width is not None:
        extras.routing = torch.full((*shape, width), -1)
    doc_ids = torch.zeros(shape, dtype=torch.long)
    return Batch(torch.full(shape, pad_id), torch.full(shape, IGNORE), doc_ids, extras)


def _write(row: Batch, place: slice, document: int, completion: Completion, advantage: float) -> None:
    """One completion into its place of a batch of one row, whose tensors are views."""
    predicted = slice(place.start + len(completion.prompt) - 1, place.stop)
    free = ~torch.tensor(completion.forced or [False] * len(completion.tokens))
    row.tokens[0, place] = torch.tensor((completion.prompt + completion.tokens)[:-1])
    row.doc_ids[0, place] = document
    row.labels[0, predicted] = torch.tensor(completion.tokens).where(free, torch.tensor(IGNORE))
    required(row.extras.sampler_logprobs)[0, predicted] = torch.tensor(completion.logprobs) * free
    required(row.extras.advantages)[0, predicted] = advantage * free
    if completion.routing is not None:
        required(row.extras.routing)[0, place] = completion.routing.long()
