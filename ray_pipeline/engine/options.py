"""What an engine is built with, besides the model and the mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.transformer import Recompute
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.schema import OptimizerConfig


def _ignore_phase(name: str) -> None:
    """Nobody asked to be told."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is computed, trained and spread over ranks. The defaults: one CPU process that only reads it.

    Attributes:
        seed: weights that are not given are drawn from it.
        optimizer: None for a model that is only read (reference, teacher).
        zero_stage: 0 is our own; 1, 2, 3 shard optimizer state, gradients, weights over replicas through DeepSpeed.
        offload_optimizer: keep the optimizer's state in CPU memory; ZeRO 1 and above.
        precision: "bf16" computes matmuls in bf16 under autocast; weights, gradients, residual stream and optimizer
            stay fp32. "fp8" is the same but for the linear layers of the blocks, which multiply in 8 bits.
        fp8_dispatch: tokens go to experts in 8 bits.
        micro_batch: rows of one forward pass.
        row_length: tokens of a row that `micro_batch` counts; of shorter rows a forward pass has as many as make the
            same tokens. None: it counts rows of any length.
        device: where the model lies; None is the CPU.
        schedule, pp_layout: order of work in the pipeline, and layers of each part where set by hand.
        activation_checkpointing: which activations are computed again in the backward pass.
        lora: train adapters in place of the weights, which are frozen; so are the balancing biases.
        indexer_warmup_steps: first training steps in which sparse attention reads everything.
        on_phase: told when a training step is past its backward passes, for the error of a rank that is lost.
    """

    seed: int = 0
    optimizer: OptimizerConfig | None = None
    zero_stage: int = 0
    offload_optimizer: bool = False
    precision: str = "fp32"
    fp8_dispatch: bool = False
    micro_batch: int = 8
    row_length: int | None = None
    device: torch.device | None = None
    schedule: str = "1f1b"
    pp_layout: str | None = None
    activation_checkpointing: Recompute = "none"
    lora: LoraConfig | None = None
    indexer_warmup_steps: int = 0
    on_phase: Callable[[str], None] = _ignore_phase
