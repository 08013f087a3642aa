"""Settings of the stages after PRETRAIN: SFT, DPO, GRPO, DISTILLATION and how they are evaluated."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator

from model.config import ModelConfig
from ray_pipeline.settings.layout_config import TeacherLayoutConfig
from ray_pipeline.settings.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    Temperature,
    Tokens,
    TrainingConfig,
    Width,
)

WITHOUT_LANDLOCK = Field(
    False, description="let a model's programs run where the kernel has no Landlock: they can read all of your files"
)


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) by `peft`; the stage's model has them merged, the adapters lie beside it."""

    r: Annotated[int, Field(ge=0, le=4096)] = Field(0, description="rank of the adapters; 0 trains every weight")
    alpha: PositiveFloat = Field(16.0, description="adapters are scaled by alpha / r")
    dropout: Fraction = 0.0
    target_modules: list[str] = Field(
        default_factory=list, description="names of linear layers that get adapters; empty: those of attention"
    )


class SftConfig(TrainingConfig):
    """Cross-entropy on the assistant's tokens and their stop token."""

    mtp_loss_weight: NonNegativeFloat = 0.1
    neftune_alpha: NonNegativeFloat = Field(0.0, description="noise on the embeddings (NEFTune, arXiv:2310.05914)")
    lora: LoraConfig = Field(default_factory=LoraConfig)


class DpoConfig(TrainingConfig):
    """Direct preference optimisation (arXiv:2305.18290) from the weights before it, which are its reference too.

    `batch_size` counts pairs.
    """

    loss_type: Literal["sigmoid", "ipo", "sigmoid_norm"] = Field(
        "sigmoid", description="ipo: arXiv:2310.12036; sigmoid_norm: log-probabilities averaged over an answer's tokens"
    )
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(0.0, description="share of labels taken as wrong")


class RolloutConfig(Section):
    """Where answers are sampled. With `max_staleness: 0` the result never depends on it."""

    engine: Literal["native", "vllm"] = Field("native", description="vllm: not offered yet")
    workers: Annotated[int, Field(ge=0, le=1 << 16)] = Field(
        0, description="Ray actors that sample; 0: the training ranks sample themselves, between updates"
    )
    max_staleness: Literal[0, 1] = Field(
        0, description="1: the next answers are sampled while this step trains, with the weights before it"
    )


class ToolsConfig(Section):
    """Functions the model may call while it answers, in GRPO and wherever a stage is evaluated."""

    names: list[str] = Field(default_factory=list, description='calculator, python, or "module:function"')
    listed: bool = Field(
        True, description="describe them in every prompt; false for data that calls them without, as builtin_tools does"
    )
    max_calls: Annotated[int, Field(gt=0, le=1000)] = Field(4, description="calls per answer; the next one ends it")
    timeout_seconds: Seconds = 5.0
    without_landlock: bool = WITHOUT_LANDLOCK


class ScoringConfig(Section):
    """Limits of reward functions, which run in processes of their own."""

    timeout_seconds: Seconds = Field(10.0, description="a reward that takes longer has failed")
    max_failures: Fraction = Field(0.05, description="share of a step's rewards that may fail before the run stops")
    processes: Annotated[int, Field(ge=0, le=1 << 12)] = Field(0, description="0: one per core")
    without_landlock: bool = WITHOUT_LANDLOCK


class GrpoConfig(TrainingConfig):
    """Group-relative policy optimisation (arXiv:2402.03300). `batch_size` is not used: rollouts decide the rows."""

    prompts_per_step: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2, le=1 << 16)] = 8
    updates_per_rollout: PositiveInt = Field(
        1, description="mini-batches that the answers of a batch of rollouts are cut into, one optimizer step each"
    )
    num_iterations: PositiveInt = Field(1, description="times that these mini-batches are gone through")
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = Field(
        "dapo",
        description="how token losses are averaged: grpo per answer, dr_grpo by max_new_tokens (arXiv:2503.20783), "
        "dapo over all tokens of the step (arXiv:2503.14476)",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="sequence: one ratio per answer (GSPO, arXiv:2507.18071)"
    )
    advantages: Literal["group", "rloo"] = Field(
        "group", description="rloo: against the mean of the other answers (arXiv:2402.14740)"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="what advantages are divided by the standard deviation of; none: Dr. GRPO"
    )
    beta: NonNegativeFloat = Field(0.01, description="weight of the KL to the reference; 0 drops the reference")
    refresh_reference_every: NonNegativeInt = Field(
        0, description="steps after which the reference becomes the current policy; 0: the input model to the end"
    )
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    resample_rounds: NonNegativeInt = Field(
        0, description="dynamic sampling (DAPO): draws of new prompts in place of groups whose answers all score alike"
    )
    overlong_buffer: NonNegativeInt = Field(
        0, description="tokens before max_new_tokens in which a penalty grows from 0 to overlong_penalty (DAPO)"
    )
    overlong_penalty: NonNegativeFloat = 1.0
    mask_truncated: bool = Field(False, description="answers cut off at max_new_tokens train nothing")
    sampler_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "sequence_mask",
        description="weight of a token's or an answer's loss: its probability by the trainer over the sampler's, which "
        "is truncated (TIS) or masked (IcePop) at the bounds; 1 where both agree",
    )
    correction_min: PositiveFloat | None = Field(None, description="lower bound of sampler_correction")
    correction_max: PositiveFloat | None = Field(3.0, description="upper bound of sampler_correction")
    off_policy_threshold: PositiveFloat | None = Field(
        None,
        description="bad answers whose tokens have become less likely than this since they were sampled (mean, nats) "
        "train nothing (arXiv:2512.02556, section 3.1)",
    )
    unbiased_kl: bool = Field(True, description="the KL's estimate times the ratio (arXiv:2512.02556, section 3.1)")
    recompute_logprobs: bool = Field(
        True,
        description="the ratio's denominator by the trainer's own forward pass; false: the sampler's, without a "
        "correction",
    )
    replay_routing: bool = Field(True, description="training uses the experts that sampling chose for each token")
    max_new_tokens: Tokens = 96
    think_budget: NonNegativeInt | None = Field(
        None, description="tokens inside <think> before </think> is written for the model; no limit without"
    )
    speculative: bool = Field(False, description="the MTP modules draft tokens of the rollouts; the same distribution")
    temperature: Temperature = 1.0
    rewards: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        default_factory=lambda: {"answer": 1.0, "format": 0.1},
        description='name -> weight; names: see `rewards`, "module:function" and "reasoning_gym:task"',
    )
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)

    @field_validator("scale_rewards", "sampler_correction", mode="before")
    @classmethod
    def _none_is_a_name_here(cls, value: object) -> object:
        """Written as a flag or in the environment, `none` reads as null."""
        return "none" if value is None else value

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one batch of rollouts."""
        return self.updates_per_rollout * self.num_iterations

    @field_validator("loss_type", mode="before")
    @classmethod
    def _no_average_of_micro_batches(cls, value: object) -> object:
        """TRL's fourth kind has a reason against it, which a list of the others would not tell."""
        if value == "bnpo":
            raise ValueError(
                "averages over the tokens of each micro-batch, so that the result would depend on micro_batch and on "
                "the number of ranks. Use dapo, the average over all tokens of a step"
            )
        return value


class StudentConfig(Section):
    """What of the teacher's architecture is smaller in the student; the rest is copied from `model`."""

    num_hidden_layers: Width = 3
    num_nextn_predict_layers: NonNegativeInt = 0
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    moe_intermediate_size: Width | None = None
    n_routed_experts: Width | None = None
    num_experts_per_tok: Width | None = None

    def applied_to(self, teacher: ModelConfig) -> ModelConfig:
        """The student's architecture: the teacher's with the keys given here."""
        return replace(teacher, **{key: value for key, value in self.model_dump().items() if value is not None})


class DistillationConfig(TrainingConfig):
    """A smaller student learns from a teacher (arXiv:1503.02531), on conversations, on what the teacher writes, and on
    what the student itself writes (arXiv:2306.13649)."""

    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher: str | None = Field(
        None,
        description="default: the stage before; a run's stage folder, a Hugging Face folder, or a file of top-k "
        'log-probabilities, "topk:PATH"',
    )
    loss: Literal["forward_kl", "reverse_kl", "jsd", "hidden", "cross_entropy"] = Field(
        "forward_kl",
        description="on the teacher's distribution; hidden: mean squared error of final hidden states besides; "
        "cross_entropy: the tokens alone, for traces (arXiv:2501.12948, §2.4)",
    )
    jsd_beta: Fraction = Field(0.5, description="jsd: 0 is forward KL, 1 is reverse KL")
    hidden_weight: NonNegativeFloat = Field(1.0, description="of the mean squared error with loss: hidden")
    temperature: Temperature = 1.0
    on_policy: Fraction = Field(0.0, description="share of steps on the student's own answers (GKD's lambda)")
    prompts_per_step: PositiveInt = Field(32, description="questions the student answers in an on-policy step")
    sampling_temperature: Temperature = Field(1.0, description="at which the teacher and the student write")
    init: Literal["teacher_layers", "random"] = Field("teacher_layers", description="where the student's weights start")
    teacher_answers: NonNegativeInt = Field(
        2000, description="answers the teacher writes to training prompts; the right ones are added to the data"
    )
    conversations: bool = Field(True, description="learn on SFT's conversations too")
    teacher_layout: TeacherLayoutConfig | None = Field(
        None, description="how the ranks hold the teacher; default: as they hold the student"
    )


class EvaluationConfig(Section):
    """Held-out questions, answered greedily."""

    questions: PositiveInt = Field(300, description="of data.heldout_questions, how many each evaluation asks")
    max_new_tokens: Tokens = 96
    min_gain: Fraction = Field(0.01, description="a stage that gains less over its input LEARNED NOTHING")
