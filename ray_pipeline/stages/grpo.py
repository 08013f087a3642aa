"""GRPO: sample groups of answers, score them, raise the likelihood of those better than their group.

The ranks sample with whole copies of the policy or with the shards they train (`layout.sampling`), or actors do.
"""

from __future__ import annotations

from typing import Any

from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.objectives.sampler_gap import SamplerGap
from ray_pipeline.stages.verdict import judge_accuracy
from ray_pipeline.training.finish import read_input, save_trained_model
from ray_pipeline.training.grpo.setup import objective_of, rollout_source
from ray_pipeline.training.heldout import HeldOut
from ray_pipeline.training.rank import rank_arguments, start_rank
from ray_pipeline.training.sampling_model import sampling_model
from ray_pipeline.training.trainer import Trainer

STAGE = "grpo"


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: measure the input, alternate rollouts and updates, measure the result."""
    rank = start_rank(arguments)
    settings = rank.config.grpo
    config, initial = read_input(rank)
    engine, gap = rank.trainer_engine(config, initial), SamplerGap()
    model = sampling_model(rank, engine)
    heldout = HeldOut(rank, model)
    input_accuracy = heldout.baseline("input")
    objective = objective_of(settings, gap)
    with rollout_source(rank, engine, model, initial, gap) as source:
        figures = Trainer(rank, engine, objective).fit(source, heldout.figures)
    save_trained_model(rank, engine)
    return figures | {"input_accuracy": input_accuracy}


def run(context: StageContext) -> StageResult:
    """Launch the ranks; learning means answering more held-out questions than the model it started from."""
    return judge_accuracy(context, context.launcher.run(STAGE, train, rank_arguments(context, STAGE)))
