"""Whether a stage that answers questions learned anything."""

from __future__ import annotations

from ray_pipeline.stages.base import StageContext, StageResult


def judge_accuracy(context: StageContext, figures: dict[str, float], **baselines: float) -> StageResult:
    """Hold the held-out accuracy against the checkpoint the stage started from.

    Args:
        figures: what the ranks measured, `accuracy` and `input_accuracy` among it. baselines: others to show.
    Returns:
        A result that learned if it gained at least `evaluation.min_gain`.
    """
    metrics = dict(figures)
    start = metrics.pop("input_accuracy")
    learned = metrics["accuracy"] >= start + context.config.evaluation.min_gain
    return StageResult(context.folder, metrics, {"input_accuracy": start, **baselines}, learned)
