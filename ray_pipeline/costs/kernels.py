"""How the operations of a layer keep their tensors, on which device: the pieces that activations are added up from.

`a` is the width of a matmul's operand in bytes: under autocast what matmuls read is cast to bf16, in fp32 all readers
share one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import erf, sqrt

from model.kernels.limits import LEAST, onednn_is_quicker
from ray_pipeline.costs.workload import BF16, FP32, Workload


@dataclass(frozen=True)
class Kernels:
    """What differs between devices.

    Attributes:
        blocked_attention: attention goes by blocks of `BLOCK` queries, and may keep the probabilities of rows of up to
            so many tokens; 0: whole rows in a fused kernel.
        shares_heads: fused attention reads one key head for several query heads; else keys and values are repeated.
        pads_rows: an expert's rows are rounded up where its products are oneDNN's: all in bf16.
        onednn_from: multiplications of a product from which oneDNN computes it in fp32 too; None: never.
        loss_bytes: of logits that a loss has at a time (`model.layers.chunked_loss`).
        loss_block: logits, of those, whose distributions it has at a time (`model.layers.block_loss`); None: all.
        loss_columns: of the vocabulary whose part of the head's gradient is made at a time; None: all.
    """

    blocked_attention: int = 0
    shares_heads: bool = False
    pads_rows: bool = False
    onednn_from: int | None = None
    loss_bytes: int = 2**28
    loss_block: int | None = None
    loss_columns: int | None = None


BLOCK, WORTH_CHOOSING, WIDE = 64, 128, 64  # queries, keys, features of a head (`model.attention`)


def kernels(device: str) -> Kernels:
    """On CPU attention is our own (`model.attention.core`), and experts' rows are padded (`model.moe.experts`)."""
    if device == "cpu":
        onednn_from = LEAST if onednn_is_quicker() else None
        return Kernels(
            blocked_attention=2048, shares_heads=True, pads_rows=True, onednn_from=onednn_from, loss_bytes=2**24,
            loss_block=2**18, loss_columns=4096,
        )  # fmt: skip
    return Kernels()


def norm_bytes(width: int) -> int:
    """Its input in fp32 and the inverse root mean square; the output is its reader's."""
    return FP32 * width + FP32


def block_norm_bytes(work: Workload) -> int:
    """The norm in front of a sublayer; DyT keeps its input and the hyperbolic tangent."""
    width = work.model.hidden_size
    return 2 * FP32 * width if work.model.norm == "dyt" else norm_bytes(width)


def read_bytes(width: int, work: Workload, *, by_products: bool = True, as_fp32: bool = False) -> int:
    """One fp32 tensor that matrix products keep, all of them the same cast of it, and an fp32 operation as it is."""
    if not work.bf16:
        return FP32 * width
    return (BF16 * by_products + FP32 * as_fp32) * width


@cache
def expected_rows(tokens: int, chosen: int, experts: int, multiple: int) -> int:
    """Rows that `experts` compute when tokens choose among them evenly and independently, padding included.

    An expert's number of tokens is binomial, here as its normal limit; every multiple that it exceeds adds one more.
    """
    if multiple == 1:
        return tokens * chosen
    share = chosen / experts
    mean, deviation = tokens * share, sqrt(tokens * share * (1 - share))
    if not deviation:
        return experts * -(-tokens // multiple) * multiple
    begun = (0.5 * (1 - erf((i + 0.5 - mean) / (deviation * sqrt(2)))) for i in range(0, tokens, multiple))
    return round(experts * multiple * sum(begun))
