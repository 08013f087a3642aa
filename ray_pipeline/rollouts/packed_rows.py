"""Rollouts as packed rows to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from ray_pipeline.data.rows.batch import IGNORE, Batch
from ray_pipeline.data.rows.packing import best_fit
from ray_pipeline.rollouts.rollout import Rollout


def positions(rollout: Rollout) -> int:
    """Places it takes in a row: its last token is only ever a label."""
    return len(rollout.prompt_ids) + len(rollout.completion_ids) - 1


def row_length(
    rollouts: Sequence[Rollout], seq_len: int, model: ModelConfig, multiple: int, *, by_documents: bool
) -> int:
    """Length of rows that train these rollouts with the fewest operations: seq_len, a part of it, or just above the
    longest of them.

    Args:
        multiple: what a length must be a multiple of, unless it is seq_len.
        by_documents: attention computes documents alone (`model.attention.blocks`); else whole rows.
    """
    lengths = [positions(r) for r in rollouts]
    longest = max(lengths, default=1)
    parts = {seq_len // count // multiple * multiple for count in range(2, seq_len // longest + 1)}
    mean = sum(lengths) // max(1, len(lengths))

    def operations(length: int) -> int:
        return len(best_fit(lengths, length)) * length * model.flops_per_token(mean if by_documents else length)

    shortest = min(-(-longest // multiple) * multiple, seq_len)
    return min(sorted({shortest, seq_len} | {part for part in parts if part > shortest}), key=operations)


def pack_rollouts(
    rollouts: Sequence[Rollout],
    advantages: Tensor,
    seq_len: int,
    pad_id: int,
    *,
    trained: Sequence[bool] | None = None,
    multiple: int = 1,
) -> Batch:
    """Several rollouts to a row, kept apart by `doc_ids`.

    Args:
        advantages: [len(rollouts)].
        trained: which of them train anything; default: all. The others still count among the answers.
        multiple: rows are lengthened by padding to the next multiple of it. Which rollouts share a row stays the same:
            a balancing loss over sequences depends on that.
    Returns:
        Position t predicts token t + 1: labels are set where that token belongs to a completion and was not forced.
        Extras, zero where there is no label: "advantages", "sampler_logprobs", and with `trained` "trained". Where
        experts were recorded, "routing", int64 [rows, seq_len, MoE layers * experts per token], -1 for none.
    Raises:
        ValueError: for a rollout longer than a row, or advantages of another length.
    """
    if len(advantages) != len(rollouts):
        raise ValueError(f"{len(advantages)} advantages for {len(rollouts)} rollouts: need one each")
    lengths = [positions(r) for r in rollouts]
    if max(lengths, default=0) > seq_len:
        raise ValueError(f"a rollout takes {max(lengths)} positions: longer than seq_len={seq_len}")
    rows = best_fit(lengths, seq_len)
    batch = _empty(len(rows), -(-seq_len // multiple) * multiple, pad_id, rollouts)
    real = batch.real = torch.zeros_like(batch.tokens, dtype=torch.bool)
    if trained is not None:
        batch.extras["trained"] = torch.zeros(batch.tokens.shape)
    for row, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members):
            place = slice(start, start + lengths[i])
            _write(batch.rows(row, row + 1), place, document, rollouts[i], float(advantages[i]))
            if trained is not None:
                batch.extras["trained"][row, place] = (batch.labels[row, place] != IGNORE) * float(trained[i])
            start = place.stop
        batch.doc_ids[row, start:] = len(members)  # padding is a document of its own
        real[row, :start] = True
    return batch


def _empty(rows: int, seq_len: int, pad_id: int, rollouts: Sequence[Rollout]) -> Batch:
    shape = (rows, seq_len)
    extras = {name: torch.zeros(shape) for name in ("advantages", "sampler_logprobs")}
    width = next((r.routing.shape[1] for r in rollouts if r.routing is not None), None)
    if width is not None:
        extras["routing"] = torch.full((*shape, width), -1)
    doc_ids = torch.zeros(shape, dtype=torch.long)
    return Batch(torch.full(shape, pad_id), torch.full(shape, IGNORE), doc_ids, extras)


def _write(row: Batch, place: slice, document: int, rollout: Rollout, advantage: float) -> None:
    """One rollout into its place of a batch of one row, whose tensors are views."""
    predicted = slice(place.start + len(rollout.prompt_ids) - 1, place.stop)
    free = ~torch.tensor(rollout.forced or [False] * len(rollout.completion_ids))
    row.tokens[0, place] = torch.tensor((rollout.prompt_ids + rollout.completion_ids)[:-1])
    row.doc_ids[0, place] = document
    row.labels[0, predicted] = torch.tensor(rollout.completion_ids).where(free, torch.tensor(IGNORE))
    row.extras["sampler_logprobs"][0, predicted] = torch.tensor(rollout.logprobs) * free
    row.extras["advantages"][0, predicted] = advantage * free
    if rollout.routing is not None:
        row.extras["routing"][0, place] = rollout.routing.long()
