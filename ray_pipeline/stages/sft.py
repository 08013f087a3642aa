"""SFT: cross-entropy on the assistant's tokens and their stop token, from the weights of the stage before.

All weights are trained, or low-rank adapters; the model that is left has these merged.
"""

from __future__ import annotations

from typing import Any

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.stages.verdict import judge_conversations
from ray_pipeline.training.batch_source import PackedSource, SeededSource
from ray_pipeline.training.finish import read_input, save_trained_model
from ray_pipeline.training.heldout import HeldOut
from ray_pipeline.training.lora import save_adapter
from ray_pipeline.training.rank import rank_arguments, start_rank
from ray_pipeline.training.sampling_model import sampling_model
from ray_pipeline.training.trainer import Trainer
from ray_pipeline.training.validation import validation_loss

STAGE = "sft"


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: measure the input, train, measure the result."""
    rank = start_rank(arguments)
    settings = rank.config.sft
    config, initial = read_input(rank)
    lora = settings.lora if settings.lora.r else None
    engine = rank.trainer_engine(config, initial, lora=lora)
    heldout = HeldOut(rank, sampling_model(rank, engine))
    input_accuracy = heldout.baseline("input")
    objective = CrossEntropy(settings.mtp_loss_weight)
    validation = PackedRows(rank.data / STAGE / "validation")
    input_loss = validation_loss(engine, validation, objective)["validation_loss"]

    def evaluate() -> dict[str, float]:
        return validation_loss(engine, validation, objective) | heldout.figures()

    train_rows = PackedRows(rank.data / STAGE / "train")
    rows = PackedSource(train_rows, rank.config.seed, settings.batch_size, rank.mesh.replica)
    source = SeededSource(rows, rank.config.seed, neftune_alpha=settings.neftune_alpha, hidden_size=config.hidden_size)
    figures = Trainer(rank, engine, objective).fit(source, evaluate)
    save_trained_model(rank, engine)
    if lora is not None:
        save_adapter(rank, engine, lora)
    return figures | {"input_accuracy": input_accuracy, "input_loss": input_loss}


def run(context: StageContext) -> StageResult:
    """Launch the ranks; learning means answering more held-out questions than the model it started from, or with
    conversations of one's own being less surprised by held-out ones."""
    return judge_conversations(context, context.launcher.run(STAGE, train, rank_arguments(context, STAGE)))
