"""Batches whose rows bring what is random in a training step: noise on embeddings, masks of dropout."""

from __future__ import annotations

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.engine.row_noise import disturb_embeddings, seed_rows
from ray_pipeline.training.row_source import PackedSource


class SeededSource:
    """`source`, each row with a seed made of (seed, step, row), and with NEFTune's noise where alpha is not zero."""

    def __init__(self, source: PackedSource, seed: int, *, neftune_alpha: float, hidden_size: int):
        self.source, self.seed = source, seed
        self.neftune_alpha, self.hidden_size = neftune_alpha, hidden_size

    def batch(self, step: int) -> Batch:
        batch = seed_rows(self.source.batch(step), self.seed, step)
        return disturb_embeddings(batch, self.neftune_alpha, self.hidden_size) if self.neftune_alpha else batch

    def metrics(self) -> dict[str, float]:
        return self.source.metrics()
