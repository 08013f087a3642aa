"""How the operations of a layer keep their tensors, on which device: the pieces that activations are added up from.

`a` is the width of a matmul's operand in bytes: under autocast every matmul keeps its own bf16 copy of its input, in
fp32 all readers share one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_pipeline.costs.workload import BF16, FP32, Workload


@dataclass(frozen=True)
class Kernels:
    """What differs between devices.

    Attributes:
        fused_norm: RMSNorm is one kernel; else the normalised input is kept too.
        blocked_attention: rows of up to so many tokens keep attention's probabilities, by blocks of `BLOCK` queries.
        shares_heads: fused attention reads one key head for several query heads; else keys and values are repeated.
    """

    fused_norm: bool
    blocked_attention: int = 0
    shares_heads: bool = False


BLOCK, WORTH_CHOOSING = 64, 128  # queries and keys (`model.attention.blocked`)


def kernels(device: str) -> Kernels:
    """On CPU torch computes RMSNorm from smaller operations, and attention is our own (`model.attention.core`)."""
    if device == "cpu":
        return Kernels(fused_norm=False, blocked_attention=2048, shares_heads=True)
    return Kernels(fused_norm=True)


def norm_bytes(width: int, on: Kernels, kept: int = FP32) -> int:
    """Its input in fp32 (`kept` bytes a number) and the inverse root mean square; the output is its reader's."""
    return kept * width + FP32 + (0 if on.fused_norm else FP32 * width)


def block_norm_bytes(work: Workload, on: Kernels) -> int:
    """The norm in front of a sublayer; DyT keeps its input and the hyperbolic tangent."""
    width = work.model.hidden_size
    return 2 * FP32 * width if work.model.norm == "dyt" else norm_bytes(width, on)


def read_bytes(width: int, work: Workload, matmuls: int, *, as_fp32: bool = False) -> int:
    """One fp32 tensor read by `matmuls` matrix products, and by an fp32 operation that keeps it."""
    if not work.bf16:
        return FP32 * width
    return BF16 * width * matmuls + (FP32 * width if as_fp32 else 0)
