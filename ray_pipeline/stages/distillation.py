"""DISTILLATION: a smaller student learns the GRPO model's distribution over conversations and over its own answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from ray_pipeline.data.batch import Batch
from ray_pipeline.data.loader import PackedRows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.objectives.distillation import ForwardKl
from ray_pipeline.stage_chain import input_stage
from ray_pipeline.stages.base import StageContext, StageResult
from ray_pipeline.stages.judge import judge_accuracy
from ray_pipeline.training.finish import read_input, save_trained_model
from ray_pipeline.training.heldout import HeldOut, WholeModel
from ray_pipeline.training.rank import Rank, rank_arguments, start_rank
from ray_pipeline.training.student import initial_student
from ray_pipeline.training.teacher_answers import MixedRows, teacher_answer_rows
from ray_pipeline.training.trainer import Trainer

STAGE = "distillation"


class TeacherSource:
    """Batches whose extras carry the teacher's final hidden states, computed through the same pipeline layout."""

    def __init__(self, rank: Rank, rows: MixedRows, teacher: Engine):
        self.rank, self.rows, self.teacher = rank, rows, teacher

    def batch(self, step: int) -> Batch:
        batch = self.rows.batch(self.rank.config.seed, step, self.rank.settings.batch_size)

        def finish(model: Transformer, hidden: Tensor, embeddings: Tensor | None, rows: Batch) -> Tensor:
            return hidden

        hidden = self.teacher.per_token(batch, finish)
        if hidden is not None:  # the rank with the last part, which alone reads it
            batch.extras["teacher_hidden"] = hidden
        return batch

    def metrics(self) -> dict[str, float]:
        return {}


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: let the teacher answer, train the student on its distribution, measure both."""
    rank = start_rank(arguments)
    settings = rank.config.distillation
    teacher_config, teacher_state = read_input(rank)
    rows = PackedRows(rank.data / "sft" / "train")
    mixed = MixedRows(rows, teacher_answer_rows(rank, WholeModel(rank, teacher_config).load(teacher_state)))
    config: ModelConfig = settings.student.applied_to(teacher_config)
    initial = initial_student(config, teacher_config, teacher_state, settings.init, rank.config.seed)
    whole = WholeModel(rank, config).load(initial)
    heldout = HeldOut(rank, whole)
    input_accuracy = heldout.baseline("input")
    engine = rank.trainer_engine(config, initial)
    teacher = rank.engine(teacher_config, initial=teacher_state)
    head = teacher.last_part.lm_head if teacher.last_part is not None else None

    def evaluate() -> dict[str, float]:
        whole.sync(engine)
        return heldout.figures()

    trainer = Trainer(rank, engine, ForwardKl(settings.temperature, head))
    figures = trainer.fit(TeacherSource(rank, mixed, teacher), evaluate)
    save_trained_model(rank, engine)
    sizes = {"params": float(config.num_params()), "teacher_params": float(teacher_config.num_params())}
    return figures | sizes | {"input_accuracy": input_accuracy}


def run(context: StageContext) -> StageResult:
    """Launch the ranks; learning means answering more held-out questions than the student did at its start."""
    figures = context.launcher.run(STAGE, train, rank_arguments(context, STAGE))
    teacher = input_stage(context.config, STAGE)
    measured = context.inputs[teacher].metrics if teacher is not None else {}
    given = {"teacher_accuracy": measured["accuracy"]} if "accuracy" in measured else {}
    return judge_accuracy(context, figures, **given)
