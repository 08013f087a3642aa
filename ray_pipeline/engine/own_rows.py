"""Which rows of a global batch a replica computes, for sources that read or make those alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.pipeline.schedule import least_micro_batches, rows_needed

if TYPE_CHECKING:
    from ray_pipeline.engine.engine import Engine


def fitted_rows(engine: Engine, rows: int, seq_len: int) -> int:
    """The fewest rows, from `rows` on, with which a training step runs in this layout."""
    least = least_micro_batches(engine.pipeline.schedule_name, engine.mesh.sizes.pp)
    return rows_needed(rows, engine.mesh.dp, engine.rows_at_once(seq_len), least)


def share_of(engine: Engine, rows: int, seq_len: int) -> slice:
    """The places of this replica's rows in a batch of `rows`; those past the end are filled with padding."""
    index, dp = engine.mesh.replica
    each = fitted_rows(engine, rows, seq_len) // dp
    return slice(index * each, (index + 1) * each)


def filled(batch: Batch, share: slice, rows: int) -> Batch:
    """This replica's rows of a global batch of `rows`, with padding behind them.

    Args:
        batch: the rows in `share`; any row of the global batch where the share lies past its end.
    """
    each = share.stop - share.start
    if share.start >= rows:
        return replace(batch.pad_rows(len(batch) + each).rows(len(batch), len(batch) + each), start=share.start)
    return replace(batch.pad_rows(each), start=share.start)


def own_rows(engine: Engine, batch: Batch) -> Batch:
    """This replica's rows of a global batch that every rank has, in memory of their own."""
    rows, seq_len = batch.tokens.shape
    share = share_of(engine, rows, seq_len)
    mine = batch.rows(share.start, share.stop) if share.start < rows else batch.rows(rows - 1, rows)
    return filled(mine.each(Tensor.clone), share, rows)
