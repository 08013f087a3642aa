"""What every section of the config is made of, and what every training stage has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Every number has two bounds: what lies beyond them cannot work, and would show only hours later, or never end.
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0, le=10**12)]  # of no run are there more documents, tokens of a shard, ...
NonNegativeInt = Annotated[int, Field(ge=0, le=10**12)]
Steps = Annotated[int, Field(gt=0, le=10**8)]
Rows = Annotated[int, Field(gt=0, le=10**7)]
Tokens = Annotated[int, Field(gt=0, le=1 << 27)]  # of one row or answer
Ranks = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 20)]  # features, layers or experts; `model.config_rules` says it in detail
Seconds = Annotated[float, Field(ge=0.01, le=7 * 86400.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
# Logits are divided by it; below this they overflow in bf16, above it every token is as likely as any other.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]
RateFactor = Annotated[float, Field(ge=1e-4, le=1e4, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
MOST_SEED = 2**63 - 1  # what torch takes and JSON readers of other languages keep


class Section(BaseModel):
    """A group of settings. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


class OptimizerConfig(Section):
    """AdamW (arXiv:1711.05101) with a warm-up and a cosine or warm-up-stable-decay schedule (arXiv:2404.06395)."""

    name: Literal["adamw", "muon", "sgd"] = Field(
        "adamw",
        description="muon: orthogonalised momentum for matrices (arXiv:2502.16982), with AdamW's lr and decay; "
        "sgd: no moments, no decay; to check gradients with",
    )
    momentum: Fraction = Field(0.95, description="of muon")
    muon_iteration: Literal["newton_schulz", "polar_express"] = Field(
        "newton_schulz", description="how muon orthogonalises: Jordan's coefficients, or those of arXiv:2505.16932"
    )
    muon_equalise: bool = Field(
        False, description="muon: steps of one size for all neurons of a matrix (NorMuon, arXiv:2510.05491)"
    )
    cautious_decay: bool = Field(
        False, description="muon: decay a weight only where the step shrinks it too (arXiv:2510.12402)"
    )
    lr: Annotated[float, Field(ge=1e-12, le=1e3, allow_inf_nan=False)] = 1e-3
    embedding_lr_factor: RateFactor = Field(
        1.0, description="on the embedding's rate; a rare token's row is seldom moved (arXiv:2203.03466). Not its decay"
    )
    head_lr_factor: RateFactor = Field(1.0, description="on the head's rate; not on its decay")
    vector_lr_factor: RateFactor = Field(1.0, description="on the rate of norms and other vectors")
    min_lr_ratio: Fraction = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 20
    decay_fraction: Fraction = Field(0.2, description="wsd: the last share of steps in which the rate falls")
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(ge=1e-20, le=1.0, allow_inf_nan=False)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=1e3, allow_inf_nan=False)] = 0.1
    grad_clip: PositiveFloat = 1.0

    def warm_up(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`: as set, or where that is longer than the run, a tenth of it.

        A rate that is still rising at the end was never reached; `checks.warnings` says so.
        """
        return self.warmup_steps if self.warmup_steps <= steps else max(1, steps // 10)


class TrainingConfig(Section):
    """What every training stage has."""

    steps: Steps = 100
    batch_size: Rows = Field(32, description="rows of seq_len tokens per optimizer step, over all ranks")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="of matrix products; fp8: bf16, and the blocks' linear layers in 8 bits (DeepSeek-V3, §3.3)"
    )
    fp8_dispatch: bool = Field(
        False, description="experts read tokens rounded to 8 bits, which is how they are sent (DeepSeek-V3, §3.3.3)"
    )
    eval_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    keep_best: bool = Field(True, description="keep the checkpoint with the best evaluation too, and name it")
    log_every: PositiveInt = 5
