"""What the software of a run does, of which this engine lacks some, and the shares of a device's speed that runs get.

The same shares hold for every run. Three were set by one published run each (`published_runs` marks them): `sustained`
of both kinds of GPU, and `GROUPED`. The others have sources of their own, or are round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Experts' products, of what large ones reach: many small ones, whose rows fill tiles in part.
GROUPED = 0.75
# Attention, of the peak: FlashAttention-3 has 0.75 at best (arXiv:2407.08608), less backward and on uneven heads.
ATTENTION = 0.5
MEMORY = 0.8  # of its bandwidth; links have the same share of theirs
# Of the way to experts and back, what a second micro-batch's computing hides: 36.55% in a profile of Qwen3-30B on 16
# H100 (github.com/NVIDIA-NeMo/Megatron-Bridge, skills/nemo-mbridge-perf-moe-comm-overlap/SKILL.md).
HIDDEN = 0.37
# DualPipe hides all of it, and gives 20 of 132 multiprocessors to it (arXiv:2412.19437, section 3.2.2).
SLOWER = 132 / 112
SCORE_PASSES = 5  # over attention's scores, where it is not one kernel: product, mask and softmax, dropout, product
OPTIMIZER = 16  # bytes per weight that an update moves: fp32 weight and gradient, two moments


@dataclass(frozen=True)
class Speeds:
    """What a device was seen to do.

    Attributes:
        bf16, fp8: FLOP/s of the best product found (github.com/stas00/ml-engineering, compute/accelerator).
        memory: bytes/s.
        sustained: of the best product, what layers' products reach, in shapes that are not the best and for hours. The
            H100 meets its limit of power and lowers its clock, the A100 hardly does.
    """

    bf16: float
    fp8: float
    memory: float
    sustained: float


_HOPPER = Speeds(794.5e12, 1453.4e12, 3.35e12, 0.72)
SPEEDS = {"a100-80gb": Speeds(267.9e12, 267.9e12, 2.04e12, 0.85), "h100": _HOPPER, "h800": _HOPPER}


@dataclass(frozen=True)
class Features:
    """How a run works.

    Attributes:
        chunks: stages of the pipeline that a rank holds.
        last_layers: layers of the rank with the head; None: as many as make it no slower than the others.
        fp8: products of layers in FP8.
        fused_attention: scores stay in the kernel, and what causality hides is left out.
        recomputes: in backward, all of a layer; attention's core; or what is cheap: norms, and the up-projections of
            latent attention.
        sequence_parallel: tensor-parallel ranks share tokens out between sublayers, so experts are sent none twice.
        overlaps_tp: messages among tensor-parallel ranks go beside products, in as many pieces as there are ranks.
        dispatch: a row for every expert; or one for every node that has one of its experts (arXiv:2412.19437, 3.2.2).
        fp8_dispatch: rows go to experts in FP8; results come back in bf16.
        overlaps_dispatch: beside another micro-batch's computing.
        overlaps_gradients: their reduction goes beside the last backward, weights come beside the first forward.
    """

    chunks: int = 1
    last_layers: int | None = None
    fp8: bool = False
    fused_attention: bool = True
    recomputes: Literal["nothing", "cheap", "attention", "all"] = "nothing"
    sequence_parallel: bool = True
    overlaps_tp: bool = False
    dispatch: Literal["by expert", "by node"] = "by node"
    fp8_dispatch: bool = False
    overlaps_dispatch: bool = False
    overlaps_gradients: bool = True
