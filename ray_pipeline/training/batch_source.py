"""Where the loop gets its batches: what it asks of a source, and the source of packed rows on disk, plain or with what
is random in a training step on them (noise, masks of dropout)."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.engine.row_noise import disturb_embeddings, seed_rows


class BatchSource(Protocol):
    """Where batches come from. A pure function of (seed, step), so that a resumed run reads the same."""

    def batch(self, step: int) -> Batch | None:
        """The global batch of optimizer step `step`, the same on every rank, or the rows of it that this rank's replica
        computes (`Batch.start`). None: there is nothing to learn from."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the latest batch worth logging (rewards, lengths)."""
        ...


@runtime_checkable
class SourceWithState(Protocol):
    """A source that depends on more than (seed, step), which checkpoints carry."""

    def resumable(self, step: int) -> bool:
        """Whether training can go on from a checkpoint written when `step` steps are done."""
        ...

    def state(self) -> dict[str, bytes]:
        """Files of a checkpoint, by name; the same on every rank."""
        ...

    def load_state(self, files: dict[str, bytes]) -> None:
        """Go on from what `state` gave."""
        ...


class PackedSource:
    """Row batches in an order that depends on (seed, step) alone. Each replica reads its own rows and no others.

    Args:
        replica: the index of this rank's, and how many there are (`Mesh.dp_rank`, `Mesh.dp`).
    """

    def __init__(self, rows: PackedRows, seed: int, batch_size: int, replica: tuple[int, int] = (0, 1)):
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        index, count = replica
        if batch_size % count:
            raise ValueError(f"a batch of {batch_size} rows cannot be split over dp={count} replicas")
        share = batch_size // count
        self.start = index * share if count > 1 else None
        self.part = slice(index * share, (index + 1) * share)

    def batch(self, step: int) -> Batch:
        return replace(self.rows.batch(self.seed, step, self.batch_size, self.part), start=self.start)

    def metrics(self) -> dict[str, float]:
        return {}


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
