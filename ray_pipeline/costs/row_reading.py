"""Bytes of packed rows that ranks read in a step, and how long that takes before the step can begin.

A rank reads the rows that its replica learns from, and no others (`training.batch_source`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_pipeline.costs.workload import Workload

STAGES = ("pretrain", "sft")  # whose batches are packed rows
# Bytes/s that shared storage gives a node: 2 TB/s for Llama 3's 2048 nodes (arXiv:2407.21783, section 3.3.1). Ranks of
# a node map the same files, so each byte comes once.
STORAGE = 1e9
# Tokens/s that one core makes batches of; 55M seen on a server's.
CORE = 50e6


@dataclass(frozen=True)
class Reading:
    """Per optimizer step.

    Attributes:
        rank: bytes that a rank reads: its replica's rows. node: those that the ranks of a node read, each once.
        storage: seconds that a node waits for its storage where none of it is in memory. making: seconds of one core.
    """

    rank: int
    node: int
    storage: float
    making: float

    @property
    def seconds(self) -> float:
        """Before the step; the plan of its time is without them."""
        return self.storage + self.making


def reading(work: Workload, node: int = 8) -> Reading | None:
    """What a step of `work` reads on nodes of `node` devices; None where its batches are not packed rows."""
    if work.stage not in STAGES:
        return None
    # A token, which document it is of, and whether it is learned: a row has one token more than it predicts.
    row = (work.seq_len + 1) * ((2 if work.model.vocab_size <= 1 << 16 else 4) + 2 + 1)
    size = work.rows_per_replica * row
    neighbours = {work.layout.coordinate(rank)["dp"] for rank in range(min(node, work.layout.world))}
    together = len(neighbours) * size
    return Reading(size, together, together / STORAGE, work.rows_per_replica * work.seq_len / CORE)
