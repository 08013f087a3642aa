"""Held-out loss: the same rows at every evaluation and in every layout, drawn from all sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.shards import RowsManifest, SourceRows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.cross_entropy import CrossEntropy

MAX_ROWS = 256  # enough for a standard error of a few millinats, at a cost of a few training steps
SAMPLE_SEED = 0  # not the run's: runs that differ in their seed are measured on the same rows


def validation_loss(engine: Engine, rows: PackedRows, objective: CrossEntropy) -> dict[str, float]:
    """Mean cross-entropy over all held-out rows, in nats per token, or its estimate from a sample of them.

    Returns:
        `validation_loss` of the whole, the MTP modules' `validation_mtp_loss`, and where rows are of several sources
        `validation_loss/NAME` of each.
    """
    sums = {name: np.zeros(2) for name in ("main", "mtp")}  # loss and tokens
    each: dict[str, float] = {}
    parts = sample(rows.manifest, MAX_ROWS)
    for name, (indices, stands_for) in parts.items():
        stats = engine.evaluate(engine.fitted(rows.take(indices)), objective)
        loss, mtp, ahead = (stats.metrics[key] for key in objective.metric_names)
        sums["main"] += stands_for * np.array([loss, stats.weight])
        sums["mtp"] += stands_for * np.array([mtp, ahead])
        if stats.weight:
            each[f"validation_loss/{name}"] = loss / stats.weight
    out = {"validation_loss": float(sums["main"][0] / sums["main"][1])}
    if sums["mtp"][1]:
        out["validation_mtp_loss"] = float(sums["mtp"][0] / sums["mtp"][1])
    return out | (each if len(parts) > 1 else {})


def sample(manifest: RowsManifest, most: int) -> dict[str, tuple[list[int], float]]:
    """Which rows are measured: name of a source -> its rows, and how many stored rows each of them stands for.

    All of them where there are no more than `most`; else a seeded draw from each source, in proportion to its rows, of
    one at least. The factor undoes what rounding to whole rows does to the proportions.
    """
    sources = manifest.sources or (SourceRows("all", manifest.rows),)
    random = np.random.default_rng(SAMPLE_SEED)
    out, start = {}, 0
    for source, count in zip(sources, shares([s.rows for s in sources], most), strict=True):
        if count:
            drawn = np.sort(random.permutation(source.rows)[:count]) + start
            out[source.name] = (drawn.tolist(), source.rows / count)
        start += source.rows
    return out


def shares(sizes: Sequence[int], most: int) -> list[int]:
    """Split `most` in proportion to `sizes` (each positive): largest remainders, none more than it has, none of zero.

    With more sizes than `most`, the largest ones get one each.
    """
    if sum(sizes) <= most:
        return list(sizes)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    out = [0] * len(sizes)
    for i in order[:most]:
        out[i] = 1
    wanted = [most * size / sum(sizes) for size in sizes]
    for _ in range(most - sum(out)):
        # The one that is furthest below its share.
        out[max((i for i in order if out[i] < sizes[i]), key=lambda i: wanted[i] - out[i])] += 1
    return out
