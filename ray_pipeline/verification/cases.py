"""What is verified: a small model in every stage's training, and every layout of a number of ranks.

Plain data; does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from model.config import ModelConfig
from model.parallel.placement import num_stages
from ray_pipeline.engine.pipeline.schedule import least_micro_batches, rows_needed
from ray_pipeline.errors import UserError
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.layout.rules import refusal
from ray_pipeline.settings.layout_config import Schedule, ZeroStage
from ray_pipeline.settings.schema import LayoutConfig, OptimizerConfig, PipelineFields

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
ZERO_STAGES: tuple[ZeroStage, ...] = get_args(ZeroStage)
MOST_PARAMETERS = 50_000_000  # of a user's own model: every rank draws all weights, and one process has to train it
# Adam divides by the gradient's size; its epsilon must stand above fp32 rounding, or a gradient that is zero but for
# rounding moves a weight by a whole step. Rounding also grows with the rate: over forty steps at 3e-3 two correct
# layouts come to differ by 2e-6 in a loss below one, at 1e-3 by an eighth of it. Clipping is active in both.
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=0, eps=1e-5, grad_clip=0.3),
    "sgd": OptimizerConfig(name="sgd", lr=1.0, warmup_steps=0, weight_decay=0.0, grad_clip=0.3),
}


Stage = Literal["pretrain", "sft", "dpo", "grpo", "distillation"]
STAGES: tuple[Stage, ...] = get_args(Stage)
OVER_BATCH = ("sft", "grpo")  # stages in which the small model's balancing loss is over the batch, not each sequence
# Between the scores of an expert that is chosen and of one that is not: rounding moves a score by some 1e-7.
LEAST_MARGIN = 2e-6
SEEDS = 8  # tried for such a margin; four in five have it
ROWS = 5  # of a step: odd, so that neither replicas nor micro-batches share them evenly


def default_steps(stages: Sequence[str]) -> int:
    """Optimizer steps that are compared: a few of PRETRAIN alone, forty wherever another stage is tried.

    Over forty steps a fault in what moves the experts' bias shows, which a single step hides.
    """
    return 4 if list(stages) == ["pretrain"] else 40


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences of losses and gradient norms; of weights absolute, where they are judged."""

    loss: float
    norm: float = 1e-4
    weights: float | None = None


# In bf16 a token near the border between two experts may go to either (one in 200 does): loss and norm stay close,
# weights and loads are shown but not judged.
TOLERANCES = {"fp32": Tolerance(2e-6, weights=1e-5), "bf16": Tolerance(2e-3, norm=5e-2)}


@dataclass(frozen=True)
class Subject:
    """The model that is trained and the batches it is given: rows of a step, in DPO pairs; GRPO's are its answers'.

    Attributes:
        seed: of weights and batches. seeds: that are tried, from there on, for one in which no choice of an expert
            hangs on rounding.
    """

    model: ModelConfig
    rows: int
    seq_len: int
    steps: int = 4
    seed: int = 0
    seeds: int = SEEDS


@dataclass(frozen=True)
class Case:
    """One layout to verify in one precision and one stage."""

    subject: Subject
    layout: Layout
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    stage: Stage = "pretrain"

    def with_seed(self, seed: int) -> Case:
        """The same with other weights and batches."""
        return replace(self, subject=replace(self.subject, seed=seed))

    def name(self) -> str:
        """`pp=2 dp=2 ZeRO=1 bf16 sgd`, and the stage unless it is PRETRAIN."""
        return " ".join([self.layout.axes() or "one rank", *self.kind()])

    def kind(self) -> tuple[str, ...]:
        """What is trained, whatever the layout: precision, optimizer, and the stage unless it is PRETRAIN."""
        return (self.precision, self.optimizer, *([] if self.stage == "pretrain" else [self.stage]))


SubjectFor = Callable[[Layout], Subject]  # the model a layout is verified with


def small_subject(layout: Layout, *, steps: int = 4, seed: int = 0) -> Subject:
    """A model with all there is: latent attention, dense layers, then experts, an MTP module; both ways to balance.

    One layer more than the pipeline has parts, so that they differ in size. Rows that no layout shares evenly, though
    they fill all but one of dualpipev's micro-batches. The experts' bias moves so fast that counting one padding token
    sends others elsewhere within a few steps: losses then differ by thousandths, not millionths.
    """
    layers = max(3, num_stages(layout.schedule, layout.pp) + 1)
    model = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=layers, first_k_dense_replace=layers // 2, num_attention_heads=8,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=8, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.1,
        router_bias_update_rate=0.01, aux_loss_alpha=0.01,
    )  # fmt: skip
    rows = max(ROWS, layout.dp * least_micro_batches(layout.schedule, layout.pp) - 1)
    return Subject(model, rows=rows, seq_len=16, steps=steps, seed=seed)


def for_stage(subject: Subject, stage: Stage) -> Subject:
    """The subject as a stage trains it; the two balancing losses take turns, where there is one."""
    over_batch = stage in OVER_BATCH and subject.model.aux_loss_alpha > 0
    return replace(subject, model=replace(subject.model, seq_aux=False)) if over_batch else subject


def own_subject(config: PipelineFields, gpus: int, *, steps: int = 4) -> Subject:
    """A user's own model, on short rows.

    Raises:
        UserError: a model too large to be trained in one process here.
    """
    size = config.model.num_params()
    if size > MOST_PARAMETERS:
        raise UserError(
            f"--config {config.recipe}: its model has {size / 1e6:,.0f}M parameters; verifying trains it in one "
            f"process as well, so at most {MOST_PARAMETERS // 1_000_000}M are taken. Omit --config: a small "
            "model of the same kind is trained then."
        )
    rows, seq_len = max(ROWS, gpus + 1), min(config.data.seq_len, 64)
    return Subject(config.model, rows, seq_len, steps, config.seed, seeds=1)  # among many experts some are always close


def settings(subject: Subject, layout: Layout) -> PipelineFields:
    """A recipe that trains the subject, for the table of rules to judge: teacher and student are the same.

    Its rows are those of a step when it is filled up for the layout (`Engine.fitted`).
    """
    at_once, least = micro_batch(subject, layout), least_micro_batches(layout.schedule, layout.pp)
    filled = rows_needed(subject.rows, layout.dp, at_once, least)
    rows: dict[str, Any] = {"batch_size": filled}
    student = {"num_hidden_layers": subject.model.num_hidden_layers, "num_nextn_predict_layers": 0}
    config = PipelineFields.model_validate(
        {
            "data": {"seq_len": subject.seq_len},
            "pretrain": rows, "sft": rows, "dpo": rows, "distillation": rows | {"student": student},
            "grpo": {"prompts_per_step": filled, "group_size": 2, "updates_per_rollout": 2},
        }
    )  # fmt: skip
    chosen = LayoutConfig(micro_batch=at_once)
    return config.model_copy(update={"model": subject.model, "layout": chosen})


def micro_batch(subject: Subject, layout: Layout) -> int:
    """The most rows of a forward pass with which the pipeline is full, and gradients accumulate where there is none."""
    wanted = max(2, layout.pp, least_micro_batches(layout.schedule, layout.pp))
    return max(1, (-(-subject.rows // layout.dp) - 1) // (wanted - 1))


@dataclass
class Selection:
    """Layouts that will be verified, and those the table refuses: rule -> layouts with their refusals."""

    legal: list[Layout] = field(default_factory=list)
    refused: dict[str, list[tuple[Layout, Refusal]]] = field(default_factory=dict)

    def add(self, layout: Layout, subject: Subject) -> None:
        """Judge one layout by the table."""
        found = refusal(settings(subject, layout), layout)
        if found is None:
            self.legal.append(layout)
        else:
            self.refused.setdefault(found[0], []).append((layout, found[1]))


def every_layout(gpus: int, subject_for: SubjectFor = small_subject) -> Selection:
    """All layouts of exactly `gpus` ranks: axes, expert parallelism, ZeRO stages, schedules.

    Activation checkpointing and offloading change what a rank keeps, not what it sends; they are tried on one mixed
    layout per ZeRO stage.
    """
    out = Selection()
    for pp, dp, tp, sp in _factorisations(gpus):
        for ep in _divisors(gpus):
            for schedule in SCHEDULES:
                for zero_stage in ZERO_STAGES:
                    layout = Layout(
                        gpus=gpus, pp=pp, dp=dp, tp=tp, ep=ep, sp=sp, zero_stage=zero_stage, schedule=schedule
                    )
                    out.add(layout, subject_for(layout))
    for zero_stage in ZERO_STAGES:
        plain = (layout for layout in out.legal if layout.schedule == "1f1b" and layout.zero_stage == zero_stage)
        mixed = max(plain, key=_axes_used)
        for kind in ("selective", "full"):
            out.add(replace(mixed, activation_checkpointing=kind), subject_for(mixed))
        if zero_stage >= 2:
            out.add(replace(mixed, offload_optimizer=True), subject_for(mixed))
    return out


def _axes_used(layout: Layout) -> tuple[int, int]:
    return sum(size > 1 for size in layout.sizes().values()), layout.tp


def _factorisations(number: int) -> Iterator[tuple[int, int, int, int]]:
    """(pp, dp, tp, sp) with that product."""
    for pp in _divisors(number):
        for dp in _divisors(number // pp):
            for tp in _divisors(number // pp // dp):
                yield pp, dp, tp, number // pp // dp // tp


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
