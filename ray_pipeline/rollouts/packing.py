"""Rollouts as packed rows to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_pipeline.data.batch import IGNORE, Batch
from ray_pipeline.rollouts.rollout import Rollout


def assign_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Which documents share a row: longest first, each into the fullest row it fits (best-fit decreasing).

    Returns:
        Indices into `lengths` by row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(seq_len)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack_rollouts(rollouts: Sequence[Rollout], advantages: Tensor, seq_len: int, pad_id: int) -> Batch:
    """Several rollouts to a row, kept apart by `doc_ids`.

    Args:
        advantages: [len(rollouts)].
    Returns:
        Position t predicts token t + 1: labels are set where that token belongs to a completion. Extras, zero where
        there is no label: "advantages" and "old_logprobs". The last token of a rollout is only ever a label. A forced
        token is read but has no label.
    Raises:
        ValueError: for a rollout longer than a row, or advantages of another length.
    """
    if len(advantages) != len(rollouts):
        raise ValueError(f"{len(advantages)} advantages for {len(rollouts)} rollouts: need one each")
    lengths = [len(r.prompt_ids) + len(r.completion_ids) - 1 for r in rollouts]
    if max(lengths, default=0) > seq_len:
        raise ValueError(f"a rollout takes {max(lengths)} positions: longer than seq_len={seq_len}")
    rows = assign_rows(lengths, seq_len)
    count = len(rows)
    tokens = torch.full((count, seq_len), pad_id)
    labels = torch.full((count, seq_len), IGNORE)
    doc_ids = torch.zeros(count, seq_len, dtype=torch.long)
    extras = {name: torch.zeros(count, seq_len) for name in ("advantages", "old_logprobs")}
    for row, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members):
            rollout, stop = rollouts[i], start + lengths[i]
            tokens[row, start:stop] = torch.tensor((rollout.prompt_ids + rollout.completion_ids)[:-1])
            doc_ids[row, start:stop] = document
            predicted = slice(start + len(rollout.prompt_ids) - 1, stop)
            free = ~torch.tensor(rollout.forced or [False] * len(rollout.completion_ids))
            labels[row, predicted] = torch.tensor(rollout.completion_ids).where(free, torch.tensor(IGNORE))
            extras["old_logprobs"][row, predicted] = torch.tensor(rollout.logprobs) * free
            extras["advantages"][row, predicted] = advantages[i].float() * free
            start = stop
        doc_ids[row, start:] = len(members)  # padding is a document of its own
    return Batch(tokens, labels, doc_ids, extras)
