"""What every section of the config is made of, and what every training stage has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
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
    lr: PositiveFloat = 1e-3
    min_lr_ratio: Fraction = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 20
    decay_fraction: Fraction = Field(0.2, description="wsd: the last share of steps in which the rate falls")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0.0)
    grad_clip: PositiveFloat = 1.0


class TrainingConfig(Section):
    """What every training stage has."""

    steps: PositiveInt = 100
    batch_size: PositiveInt = Field(32, description="rows of seq_len tokens per optimizer step, over all ranks")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32", description="of matrix products; fp8: bf16, and the blocks' linear layers in 8 bits (DeepSeek-V3, §3.3)"
    )
    eval_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    keep_best: bool = Field(True, description="keep the checkpoint with the best evaluation too, and name it")
    log_every: PositiveInt = 5
