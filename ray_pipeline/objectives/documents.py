"""Sums over the documents of packed rows, whole also where sequence parallelism cuts a row over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from model.layers.loss import IGNORE
from model.parallel.collectives import Axis, copy_to, reduce_from
from ray_pipeline.data.rows.batch import Batch


def sum_over_ranks(partial: Tensor, axis: Axis) -> Tensor:
    """Sum of every rank's part, which each rank goes on with: gradients are summed over the ranks too."""
    return copy_to(reduce_from(partial, axis), axis)


def sum_documents(values: Tensor, batch: Batch, axis: Axis) -> Tensor:
    """Sum over each document, at its number.

    Args:
        values: [rows, seq / sp], this rank's positions. axis: the sequence-parallel ranks.
    Returns:
        [rows, seq]: column d is the sum over document d of that row; zero where there is no such document.
    """
    table = values.new_zeros(batch.tokens.shape).scatter_add(1, batch.local(batch.doc_ids), values)
    return sum_over_ranks(table, axis)


def document_lengths(batch: Batch, counted: Tensor) -> Tensor:
    """Counted tokens of each document, at its number; whole rows are known to every rank, so nothing is exchanged.

    Args:
        counted: [rows, seq] bool.
    Returns:
        [rows, seq] fp32, as in `sum_documents`.
    """
    return torch.zeros(counted.shape, device=counted.device).scatter_add(1, batch.doc_ids, counted.float())


def of_each_token(table: Tensor, batch: Batch) -> Tensor:
    """The value of each token's document: a table by document [rows, seq] -> [rows, seq / sp]."""
    return table.gather(1, batch.local(batch.doc_ids))


def count_answers(batch: Batch) -> int:
    """Documents with at least one label."""
    return int((document_lengths(batch, batch.labels != IGNORE) > 0).sum())
