"""DPO: of two answers to a prompt, raise the likelihood of the chosen one against the rejected one's."""

from __future__ import annotations

from typing import Any

from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.objectives.preference import Dpo
from ray_pipeline.stages.verdict import judge_preferences
from ray_pipeline.training.finish import read_input, save_trained_model
from ray_pipeline.training.heldout import HeldOut
from ray_pipeline.training.pairs import HeldOutPairs, PairSource, read_pairs, reference_logprobs
from ray_pipeline.training.rank import rank_arguments, start_rank
from ray_pipeline.training.sampling_model import sampling_model
from ray_pipeline.training.trainer import Trainer

STAGE = "dpo"


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: measure the input, which is the reference too, train, measure the result."""
    rank = start_rank(arguments)
    settings = rank.config.dpo
    config, initial = read_input(rank)
    engine = rank.trainer_engine(config, initial)
    heldout = HeldOut(rank, sampling_model(rank, engine))
    input_accuracy = heldout.baseline("input")
    objective = Dpo(loss_type=settings.loss_type, beta=settings.beta, label_smoothing=settings.label_smoothing)
    pairs = read_pairs(rank)
    reference = reference_logprobs(rank, engine, pairs)
    heldout_pairs = HeldOutPairs(engine, objective, pairs["validation"], reference["validation"])

    def evaluate() -> dict[str, float]:
        return heldout_pairs.figures() | heldout.figures()

    source = PairSource(rank, engine, pairs["train"], reference["train"])
    figures = Trainer(rank, engine, objective).fit(source, evaluate)
    save_trained_model(rank, engine)
    before = {"input_accuracy": input_accuracy, "input_preference_accuracy": heldout_pairs.input_accuracy()}
    return figures | before


def run(context: StageContext) -> StageResult:
    """Launch the ranks; learning means preferring the chosen answer of more held-out pairs than the model before."""
    return judge_preferences(context, context.launcher.run(STAGE, train, rank_arguments(context, STAGE)))
