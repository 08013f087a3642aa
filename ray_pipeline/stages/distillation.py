"""DISTILLATION: a smaller student learns from a teacher: its distribution, its answers, its judgement of the student's.

The teacher is the stage before, a folder, or a file of log-probabilities; a student that learns on conversations alone
has none, which makes it the baseline that the others are held against.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.tasks.question import prepared_questions
from ray_pipeline.engine.engine import Engine
from ray_pipeline.errors import UserError
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.objectives.distillation import distillation_objective
from ray_pipeline.settings.chain import input_stage, is_top_k, teacher_path
from ray_pipeline.settings.run_folder import TOKENIZER, TRAIN_QUESTIONS
from ray_pipeline.stages.verdict import judge_accuracy
from ray_pipeline.teachers.engine_teacher import EngineTeacher, Teacher, load_teacher
from ray_pipeline.teachers.teacher_answers import teacher_answer_rows
from ray_pipeline.teachers.teacher_folder import check_widths
from ray_pipeline.teachers.top_k import TopKRows
from ray_pipeline.training.distillation.distillation_batches import (
    DistillationSource,
    MixedRows,
    Rows,
    Scorer,
    StudentAnswers,
)
from ray_pipeline.training.distillation.student import InitialStudent
from ray_pipeline.training.finish import save_trained_model
from ray_pipeline.training.heldout import HeldOut
from ray_pipeline.training.rank import Rank, rank_arguments, start_rank
from ray_pipeline.training.sampling_model import frozen_model, sampling_model
from ray_pipeline.training.trainer import Trainer

STAGE = "distillation"


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: let the teacher answer, train the student, measure both."""
    rank = start_rank(arguments)
    settings = rank.config.distillation
    teacher = load_teacher(rank)
    config = settings.student.applied_to(teacher.base)
    rows = make_rows(rank, teacher)
    figures = {"params": float(config.num_params())} | teacher_figures(rank, teacher)
    initial = InitialStudent(config, teacher.base, teacher.state or {}, settings.init, rank.config.seed)
    engine = rank.trainer_engine(config, initial)
    model = sampling_model(rank, engine)
    heldout = HeldOut(rank, model)
    figures["input_accuracy"] = heldout.baseline("input")
    scorer = make_scorer(rank, engine, teacher)
    answers = None
    if settings.on_policy:
        answers = StudentAnswers(engine, model, prepared_questions(rank.data / TRAIN_QUESTIONS))
    source = DistillationSource(rank, rows, answers, scorer)
    objective = distillation_objective(settings, None if scorer is None else scorer.head)
    figures |= Trainer(rank, engine, objective).fit(source, heldout.figures)
    save_trained_model(rank, engine)
    return figures


def make_rows(rank: Rank, teacher: Teacher) -> Rows | None:
    """What is learned from in steps that are not on the student's own answers; None where there are none.

    Raises:
        UserError: the teacher has not answered a single question right, and there is nothing else.
    """
    settings = rank.config.distillation
    if settings.on_policy == 1:
        return None
    stored = PackedRows(rank.data / "sft" / "train") if settings.conversations else None
    if is_top_k(settings.teacher):
        assert stored is not None and settings.teacher is not None, "the settings were checked"
        return TopKRows(stored, rank.data / TOKENIZER, teacher_path(settings.teacher), settings.temperature)
    written = teacher_answer_rows(rank, teacher) if settings.teacher_answers else None
    if stored is None and written is None:
        raise UserError(
            f"distillation.teacher_answers={settings.teacher_answers}: the teacher answered none of them right, and "
            "with distillation.conversations=false there is nothing else to learn from. Use a better teacher, or "
            "conversations=true."
        )
    return MixedRows(stored, written)


def teacher_figures(rank: Rank, teacher: Teacher) -> dict[str, float]:
    """Size of the teacher, and its held-out accuracy where no stage has measured it."""
    if teacher.config is None or teacher.state is None:
        return {}
    figures = {"teacher_params": float(teacher.config.num_params())}
    if input_stage(rank.config, STAGE) is None and teacher.same_tokenizer:
        model = frozen_model(rank, teacher.config, teacher.state)
        figures["teacher_accuracy"] = HeldOut(rank, model).baseline("teacher")
    return figures


def make_scorer(rank: Rank, student: Engine, teacher: Teacher) -> Scorer | None:
    """What adds the teacher's hidden states to batches; None where tokens, or stored log-probabilities, are enough."""
    settings = rank.config.distillation
    if settings.loss == "cross_entropy" or is_top_k(settings.teacher):
        return None
    if teacher.config is not None:
        assert teacher.state is not None
        if settings.loss == "hidden":
            check_widths(student.config.hidden_size, teacher.config.hidden_size)
        return EngineTeacher(rank, student, teacher.config, teacher.state)
    from ray_pipeline.teachers.transformers_teacher import TransformersTeacher  # transformers takes seconds to import

    assert teacher.folder is not None
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    found = TransformersTeacher(teacher.folder.path, student, dtype=dtype)
    if settings.loss == "hidden" and found.model is not None:
        check_widths(student.config.hidden_size, found.width)
    return found


def run(context: StageContext) -> StageResult:
    """Launch the ranks; learning means answering more held-out questions than the student did at its start."""
    figures = context.launcher.run(STAGE, train, rank_arguments(context, STAGE))
    teacher = input_stage(context.config, STAGE)
    measured = context.inputs[teacher].metrics if teacher is not None else {}
    given = {"teacher_accuracy": measured["accuracy"]} if "accuracy" in measured else {}
    if "teacher_accuracy" in figures:
        given["teacher_accuracy"] = figures.pop("teacher_accuracy")
    return judge_accuracy(context, figures, **given)
