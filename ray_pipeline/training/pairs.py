"""DPO's batches and evaluation: pairs, the reference's log-probabilities of their answers, held-out preferences.

The reference is the model the stage starts from, so the engine itself measures it, before its first step. It is
measured once: a resumed run reads what the first one found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.layers.loss import IGNORE, label_logprobs
from model.parallel.gather import all_ranks_gather
from model.transformer import Transformer
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import row_order
from ray_pipeline.data.rows.preferences import PairRows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.own_rows import filled, share_of
from ray_pipeline.evaluation.statistics import wilson_interval
from ray_pipeline.objectives.preference import Dpo, answer_lengths, answer_places
from ray_pipeline.records.artifacts import atomic_folder
from ray_pipeline.records.integrity import damage
from ray_pipeline.training.rank import Rank

REFERENCE = "reference_logprobs"
PAIRS_AT_ONCE = 128  # of a forward pass over all ranks, between two reports of progress


def read_pairs(rank: Rank) -> dict[str, PairRows]:
    """DATA_PREP's pairs: "train" and "validation"."""
    folder = rank.data / "preferences"
    return {name: PairRows(folder / name, rank.config.data.seq_len) for name in ("train", "validation")}


def reference_logprobs(rank: Rank, engine: Engine, sets: Mapping[str, PairRows]) -> dict[str, Tensor]:
    """log p of every answer under the engine's present weights, kept in the stage's folder with their SHA-256 sums.

    Returns:
        By name of the set, [pairs, 2] fp32, chosen and rejected; read back on every rank.
    """
    folder = rank.folder / REFERENCE
    if not all_ranks_gather(rank.mesh, _is_whole(folder, sets))[0]:
        measured = {name: answer_logprobs(rank, engine, rows) for name, rows in sets.items()}
        if rank.is_main:
            with atomic_folder(folder) as aside:
                save_file(measured, aside / "pairs.safetensors")
        all_ranks_gather(rank.mesh, None)  # nobody reads before the file is there
    return load_file(folder / "pairs.safetensors")


def _is_whole(folder: Path, sets: Mapping[str, PairRows]) -> bool:
    if damage(folder) is not None:
        return False
    found = load_file(folder / "pairs.safetensors")
    return {name: len(values) for name, values in found.items()} == {name: len(rows) for name, rows in sets.items()}


def _logprobs(model: Transformer, hidden: Tensor, embeddings: Tensor | None, part: Batch) -> Tensor:
    """Of the labels: [rows, seq / sp]; what `Engine.per_token` is given."""
    return label_logprobs(hidden, model.lm_head, part.local(part.labels))


def answer_logprobs(rank: Rank, engine: Engine, rows: PairRows) -> Tensor:
    """log p of the answers of every pair in stored order, the same on every rank: [pairs, 2] fp32."""

    found = []
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        rank.phase("reference log-probabilities", start, len(rows))
        batch = engine.fitted(rows.slice(start, start + PAIRS_AT_ONCE))
        logprobs = engine.per_token(batch, _logprobs)  # zero but where this rank's rows and positions are
        table = torch.zeros(answer_lengths(batch).numel(), dtype=torch.float64)
        if logprobs is not None:
            table.index_add_(0, answer_places(batch).flatten(), logprobs.double().flatten())
        table = engine.mesh.all_reduce(engine.mesh.all_reduce(table.to(engine.device), "replica"), "pp")
        found.append(table.view(-1, 2).float().cpu())
    return torch.cat(found)


def with_reference(batch: Batch, reference: Tensor) -> Batch:
    """The batch with `ref_logprobs`: an answer's log p spread evenly over its tokens.

    Args:
        reference: [pairs, 2] of the batch's pairs, in their order.
    """
    per_token = (reference / answer_lengths(batch).clamp(min=1.0)).flatten()
    spread = per_token[answer_places(batch)].masked_fill(batch.labels == IGNORE, 0.0)
    batch.extras.ref_logprobs = spread
    return batch


class PairSource:
    """Batches of pairs in an order that depends on (seed, step) alone. Each replica reads the pairs of its own rows."""

    def __init__(self, rank: Rank, engine: Engine, rows: PairRows, reference: Tensor):
        self.rank, self.engine, self.rows, self.reference = rank, engine, rows, reference

    def batch(self, step: int) -> Batch:
        indices = row_order(len(self.rows), self.rank.config.seed, step, self.rank.settings.batch_size)
        rows = self.rows.rows_of(indices)
        share = share_of(self.engine, len(rows), self.rows.seq_len)
        mine = rows[share] or rows[-1:]
        own = [indices[place] for row in mine for place in row]
        numbers = iter(range(len(own)))
        batch = self.rows.packed(own, [[next(numbers) for _ in row] for row in mine])
        return filled(with_reference(batch, self.reference[own]), share, len(rows))

    def metrics(self) -> dict[str, float]:
        return {}


class HeldOutPairs:
    """Pairs that nothing is trained on."""

    def __init__(self, engine: Engine, objective: Dpo, rows: PairRows, reference: Tensor):
        self.engine, self.objective, self.rows, self.reference = engine, objective, rows, reference

    def figures(self) -> dict[str, float]:
        """Of the engine's present weights: the loss, the objective's metrics, and 95% bounds of both accuracies."""
        totals = dict.fromkeys(("preference_loss", *self.objective.metric_names), 0.0)
        for start in range(0, len(self.rows), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            batch = with_reference(self.rows.slice(part.start, part.stop), self.reference[part])
            batch = self.engine.fitted(batch)
            stats = self.engine.evaluate(batch, self.objective)
            totals["preference_loss"] += stats.loss * stats.weight
            for name, value in stats.metrics.items():
                totals[name] += value
        figures = {name: value / len(self.rows) for name, value in totals.items()}
        for name in ("preference_accuracy", "reward_accuracy"):
            bounds = wilson_interval(round(totals[name]), len(self.rows))
            figures |= dict(zip((f"{name}_low", f"{name}_high"), bounds, strict=True))
        return figures | {"preference_pairs": float(len(self.rows))}

    def input_accuracy(self) -> float:
        """`preference_accuracy` of the reference, from its log-probabilities."""
        lengths = torch.ones_like(self.reference)
        if self.objective.per_token:
            lengths = torch.cat([answer_lengths(self.rows.slice(i, i + 1)) for i in range(len(self.rows))])
        scores = self.reference / lengths
        return (scores[:, 0] > scores[:, 1]).double().mean().item()
