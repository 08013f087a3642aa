"""Batches from packed rows on disk."""

from __future__ import annotations

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import PackedRows


class PackedSource:
    """Row batches in an order that depends on (seed, step) alone."""

    def __init__(self, rows: PackedRows, seed: int, batch_size: int):
        self.rows, self.seed, self.batch_size = rows, seed, batch_size

    def batch(self, step: int) -> Batch:
        return self.rows.batch(self.seed, step, self.batch_size)

    def metrics(self) -> dict[str, float]:
        return {}
