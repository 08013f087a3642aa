"""Held-out loss: the same rows in the same order at every evaluation."""

from __future__ import annotations

from ray_pipeline.data.loader import PackedRows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.cross_entropy import CrossEntropy

MAX_ROWS = 256  # enough for a standard error of a few millinats, at a cost of a few training steps


def validation_loss(engine: Engine, rows: PackedRows, objective: CrossEntropy) -> dict[str, float]:
    """Mean cross-entropy in nats per token, `validation_loss`, and the MTP modules', `validation_mtp_loss`."""
    count = min(len(rows), MAX_ROWS)
    batch = engine.fitted(rows.slice(0, count))
    stats = engine.evaluate(batch, objective)
    out = {"validation_loss": stats.metrics["cross_entropy"] / stats.weight}
    if stats.metrics["mtp_tokens"]:
        out["validation_mtp_loss"] = stats.metrics["mtp_cross_entropy"] / stats.metrics["mtp_tokens"]
    return out
