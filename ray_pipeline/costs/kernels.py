"""How the operations of a layer keep their tensors, on which device: the pieces that activations are added up from.

`a` is the width of a matmul's operand in bytes: under autocast what matmuls read is cast to bf16, in fp32 all readers
share one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import erf, sqrt

from model.kernels.limits import BLOCK_ELEMENTS, CHUNK_BYTES, COLUMNS, LEAST, LONGEST, onednn_is_quicker
from ray_pipeline.costs.workload import BF16, FP32, Workload


@dataclass(frozen=True)
class Kernels:
    """What differs between devices.

    Attributes:
        blocked_attention: attention goes by blocks of queries, and may keep the probabilities of rows of up to so many
            tokens; 0: whole rows in a fused kernel.
        pads_rows: an expert's rows are rounded up where its products are oneDNN's: all in bf16.
        onednn_from: multiplications of a product from which oneDNN computes it in fp32 too; None: never.
        loss_bytes: of logits that a loss has at a time (`model.layers.chunked_loss`).
        loss_block: logits, of those, whose distributions it has at a time (`model.layers.block_loss`); None: all.
        loss_columns: of the vocabulary whose part of the head's gradient is made at a time; None: all.
    """

    blocked_attention: int = 0
    pads_rows: bool = False
    onednn_from: int | None = None
    loss_bytes: int = CHUNK_BYTES["cuda"]
    loss_block: int | None = None
    loss_columns: int | None = None


def kernels(device: str) -> Kernels:
    """On CPU attention goes by blocks (`model.kernels.cpu`), and experts' rows are padded."""
    if device == "cpu":
        return Kernels(
            blocked_attention=LONGEST, pads_rows=True, onednn_from=LEAST if onednn_is_quicker() else None,
            loss_bytes=CHUNK_BYTES["cpu"], loss_block=BLOCK_ELEMENTS, loss_columns=COLUMNS["cpu"],
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
