"""Whether a stage that answers questions, or prefers answers, learned anything."""

from __future__ import annotations

from dataclasses import replace

from ray_pipeline.data.sources.sources import SFT_BUILTIN
from ray_pipeline.launch.stage_context import StageContext, StageResult


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


def judge_conversations(context: StageContext, figures: dict[str, float]) -> StageResult:
    """Hold held-out answers and the held-out loss against the checkpoint the stage started from.

    Args:
        figures: what the ranks measured: `accuracy` and `validation_loss`, with `input_accuracy` and `input_loss`.
    Returns:
        A result that learned if it answers at least `evaluation.min_gain` more of the questions. Conversations of the
        user's own may teach something else than the questions ask: there it is enough that the loss on held-out ones
        fell by as many nats.
    """
    least, start = context.config.evaluation.min_gain, figures["input_loss"]
    answers = judge_accuracy(context, {name: value for name, value in figures.items() if name != "input_loss"})
    own = context.config.data.sft not in SFT_BUILTIN
    imitates = own and figures["validation_loss"] <= start - least
    return replace(answers, baselines=answers.baselines | {"input_loss": start}, learned=answers.learned or imitates)


def judge_preferences(context: StageContext, figures: dict[str, float]) -> StageResult:
    """Hold held-out preferences against the model the stage started from.

    Args:
        figures: what the ranks measured: `preference_accuracy` and `accuracy`, both with `input_` too, and
            `reward_accuracy_low`, the lower bound of the share of pairs whose chosen answer gained more.
    Returns:
        A result that learned if the chosen answer is the likelier one in at least `evaluation.min_gain` more pairs,
        or surely gained more in as many above a half: where the rejected answer is much the shorter one, it may stay
        the likelier one for all that was learned (arXiv:2405.19534).
    """
    metrics, least = dict(figures), context.config.evaluation.min_gain
    baselines = {name: metrics.pop(name) for name in ("input_preference_accuracy", "input_accuracy")}
    baselines["chance_reward_accuracy"] = 0.5
    likelier = metrics["preference_accuracy"] >= baselines["input_preference_accuracy"] + least
    learned = likelier or metrics["reward_accuracy_low"] >= 0.5 + least
    return StageResult(context.folder, metrics, baselines, learned)
