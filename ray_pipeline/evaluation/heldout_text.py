"""Held-out text of a run, for exports: one half to weigh features by before rounding, the other to measure on.

The halves share no row, so that what was measured was not what the rounding was made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.shards import MANIFEST

SETS = ("pretrain/validation", "sft/validation")
WEIGHED_ROWS = 64  # of each set; llama.cpp's own users take 20,000 to 100,000 tokens, and little changes beyond
MEASURED_TOKENS = 1024
BATCH_ROWS = 8


@dataclass(frozen=True)
class HeldOutText:
    """Rows of the sets that a run held out.

    Attributes:
        weighed: batches of whole rows. measured: documents, each a list of ids with at least one to predict.
    """

    weighed: list[Batch]
    measured: list[list[int]]

    def for_importance(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, documents and whether each is no padding, as `importance_matrix` takes them."""
        out = []
        for batch in self.weighed:
            assert batch.real is not None, "packed rows say what is padding"
            out.append((batch.tokens, batch.doc_ids, batch.real))
        return out


def heldout_text(data: Path, context: int) -> HeldOutText:
    """Even rows are weighed, odd ones measured, of every set that is there.

    Args:
        data: DATA_PREP's folder. context: tokens that the model holds; documents are cut to as many.
    Raises:
        UserError: rows that are damaged.
    """
    sets = [PackedRows(data / name) for name in SETS if (data / name / MANIFEST).is_file()]
    weighed: list[Batch] = []
    measured: list[list[int]] = []
    for rows in sets:
        even = list(range(0, min(len(rows), 2 * WEIGHED_ROWS), 2))
        if rows.seq_len <= context:
            weighed += [rows.take(even[i : i + BATCH_ROWS]) for i in range(0, len(even), BATCH_ROWS)]
        wanted = MEASURED_TOKENS // len(sets)
        for row in range(1, len(rows), 2):
            for document in _documents(rows.take([row]), context):
                if wanted > 0:
                    measured.append(document[: wanted + 1])
                    wanted -= len(measured[-1]) - 1
    return HeldOutText(weighed, measured)


def _documents(batch: Batch, context: int) -> list[list[int]]:
    """The documents of one row, each cut to the context; those of one token predict nothing."""
    assert batch.real is not None
    tokens, documents, real = batch.tokens[0], batch.doc_ids[0], batch.real[0]
    found = [tokens[(documents == number) & real].tolist()[:context] for number in documents.unique().tolist()]
    return [document for document in found if len(document) > 1]
