"""A stage's training as the stage itself sets it up, on made-up data: its engine, its objective, its batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parallel.mesh import Mesh
from ray_pipeline.data.rows.batch import Batch
from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.preferences import PairRows
from ray_pipeline.engine.engine import Engine
from ray_pipeline.launch.rank_errors import RankStatus
from ray_pipeline.layout.layout import with_layout
from ray_pipeline.objectives.base import Objective
from ray_pipeline.objectives.cross_entropy import CrossEntropy
from ray_pipeline.objectives.distillation import distillation_objective
from ray_pipeline.objectives.preference import Dpo
from ray_pipeline.objectives.sampler_gap import SamplerGap
from ray_pipeline.settings.schema import PipelineFields
from ray_pipeline.teachers.engine_teacher import EngineTeacher
from ray_pipeline.training.batch_source import PackedSource, SeededSource
from ray_pipeline.training.distillation.distillation_batches import DistillationSource, MixedRows
from ray_pipeline.training.distillation.student import InitialStudent
from ray_pipeline.training.grpo.reference import Reference
from ray_pipeline.training.grpo.rollout_batch import BatchBuilder
from ray_pipeline.training.grpo.setup import objective_of
from ray_pipeline.training.pairs import PairSource, reference_logprobs
from ray_pipeline.training.rank import Rank
from ray_pipeline.verification.cases import OPTIMIZERS, Case, Subject, settings
from ray_pipeline.verification.made_data import PAD, made_groups

WHOLE = 1 << 10  # rows of a forward pass: more than any batch here has
ANSWERS = {
    "prompts_per_step": 4, "group_size": 4, "updates_per_rollout": 2, "mask_truncated": True, "beta": 0.1,
    # No policy wrote these answers: its correction would leave most of them out. And in fp32 a ratio of probabilities
    # of e^-5 is known to half a millionth: one such factor in a loss is enough.
    "sampler_correction": "none",
}  # fmt: skip
RATES = {"grpo": 0.2}  # of the optimizer's: a ratio's gradients are large beside its loss
OWN: dict[str, dict[str, Any]] = {
    "sft": {"neftune_alpha": 5.0},
    "grpo": ANSWERS,
    "distillation": {"loss": "hidden"},
}


class Source(Protocol):
    """Where a stage's batches come from."""

    def batch(self, step: int) -> Batch | None:
        """The global batch of a step."""
        ...


@dataclass
class Training:
    """What a stage trains, what it minimises, on what."""

    engine: Engine
    objective: Objective
    source: Source


def made_rank(
    case: Case, mesh: Mesh, *, device: torch.device, folder: Path, data: Path, whole_batch: bool = False
) -> Rank:
    """This process as a rank of the case's stage.

    Args:
        folder: the stage's, empty. data: what `write_data` wrote.
        whole_batch: one forward pass for all rows, as the reference does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    status = RankStatus(folder, mesh.rank, mesh.sizes.coordinate(mesh.rank), case.stage)
    config = stage_config(case, whole_batch=whole_batch)
    return Rank(config, case.stage, folder, data, {}, mesh, device, status, None)


def stage_config(case: Case, *, whole_batch: bool = False) -> PipelineFields:
    """The settings of the case's stage and layout."""
    subject, config = case.subject, with_layout(settings(case.subject, case.layout), case.layout)
    optimizer = OPTIMIZERS[case.optimizer]
    common = {
        "steps": subject.steps, "batch_size": subject.rows, "precision": case.precision,
        "optimizer": optimizer.model_copy(update={"lr": optimizer.lr * RATES.get(case.stage, 1.0)}),
    }  # fmt: skip
    own = OWN.get(case.stage, {}) | ({"max_new_tokens": subject.seq_len // 2} if case.stage == "grpo" else {})
    stage = getattr(config, case.stage).model_copy(update=common | own)
    layout = config.layout.model_copy(update={"micro_batch": WHOLE}) if whole_batch else config.layout
    return config.model_copy(update={case.stage: stage, "layout": layout, "seed": subject.seed})


def start(rank: Rank, subject: Subject) -> Training:
    """The stage's training before its first step; every rank calls this."""
    model = subject.model
    engine = rank.trainer_engine(model, None)
    if rank.stage == "dpo":
        return _dpo(rank, engine, other_weights(model, rank.config.seed))
    if rank.stage == "grpo":
        return _grpo(rank, engine, subject, other_weights(model, rank.config.seed))
    if rank.stage == "distillation":
        return _distillation(rank, engine, other_weights(model, rank.config.seed))
    # Every rank has the whole batch, which no layout here divides; a run's replicas read rows of their own.
    rows = PackedSource(PackedRows(rank.data / rank.stage / "train"), rank.config.seed, rank.settings.batch_size)
    if rank.stage == "pretrain":
        return Training(engine, CrossEntropy(rank.config.pretrain.mtp_loss_weight), rows)
    sft = rank.config.sft
    noisy = SeededSource(rows, rank.config.seed, neftune_alpha=sft.neftune_alpha, hidden_size=model.hidden_size)
    return Training(engine, CrossEntropy(sft.mtp_loss_weight), noisy)


def other_weights(model: ModelConfig, seed: int) -> Mapping[str, Tensor]:
    """Of a reference or a teacher: with the policy's own its margins and divergences would begin as rounding alone."""
    return InitialStudent(model, model, {}, "random", seed + 1)


def _dpo(rank: Rank, engine: Engine, weights: Mapping[str, Tensor]) -> Training:
    chosen = rank.config.dpo
    rows = PairRows(rank.data / "preferences" / "train", rank.config.data.seq_len)
    reference = reference_logprobs(rank, rank.engine(engine.config, initial=weights), {"train": rows})
    objective = Dpo(loss_type=chosen.loss_type, beta=chosen.beta, label_smoothing=chosen.label_smoothing)
    return Training(engine, objective, PairSource(rank, engine, rows, reference["train"]))


def _grpo(rank: Rank, engine: Engine, subject: Subject, weights: Mapping[str, Tensor]) -> Training:
    chosen = rank.config.grpo
    reference = Reference(
        rank, engine.config, weights, every=0, updates=chosen.steps_per_rollout, temperature=chosen.temperature
    )
    builder = BatchBuilder(chosen, engine, reference, rank.config.data.seq_len, PAD, rank.config.seed)
    return Training(engine, objective_of(chosen, SamplerGap()), MadeRollouts(subject, builder))


def _distillation(rank: Rank, engine: Engine, weights: Mapping[str, Tensor]) -> Training:
    teacher = EngineTeacher(rank, engine, engine.config, weights)
    source = DistillationSource(rank, MixedRows(PackedRows(rank.data / "sft" / "train"), None), None, teacher)
    return Training(engine, distillation_objective(rank.config.distillation, teacher.head), source)


class MadeRollouts:
    """GRPO's mini-batches of answers that nobody sampled."""

    def __init__(self, subject: Subject, builder: BatchBuilder):
        self.subject, self.builder = subject, builder
        self._batches: list[Batch | None] = []

    def batch(self, step: int) -> Batch | None:
        """Steps are asked for one after another, from 0 on."""
        settings = self.builder.settings
        iteration, inside = divmod(step, settings.steps_per_rollout)
        if inside == 0:
            self._batches = self.builder.build(made_groups(self.subject, settings, iteration), step)
        return self._batches[inside % len(self._batches)]
