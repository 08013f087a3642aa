"""Kinds of files that a model is exported to: one table, which settings, verbs, writers and checks read. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

HfKind = Literal["float32", "bfloat16", "fp8"]
GgufKind = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k"
]  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """How far a program that reads the file may be from our model in fp32 with the very weights of the file.

    Attributes:
        agreement: least share of positions with the same likeliest token.
        mean: largest mean |Δ log p|, weighted by p. worst: largest |Δ log p| of any token with p >= 1%.
        coarse: largest mean up to which a file beyond the others is refused alone: rounding can move what the model
            chooses to read or where it sends a token, and no program is at fault. A file beyond it too is wrong.
    """

    agreement: float
    mean: float
    worst: float
    coarse: float = 0.0


# Both compute in fp32, in another order.
EXACT = Tolerance(1.0, 1e-3, 1e-2)
# A graph of the same operations in the same precision.
SAME = Tolerance(1.0, 1e-5, 1e-4)
# llama.cpp rounds what it multiplies with these weights, too. A rounding can send a token to another expert, so the
# largest difference is not bounded; the mean tells a wrong tensor (whole nats) from rounding.
HALF = Tolerance(0.95, 0.02, math.inf)
ROUNDED = Tolerance(0.85, 0.1, math.inf)
COARSE = Tolerance(0.85, 0.1, math.inf, coarse=1.0)  # nats; wrong tensors and wrong metadata are further off


@dataclass(frozen=True)
class ExportKind:
    """One kind of file.

    Attributes:
        name: as it is typed. what: it in a few words.
        form: hf (a folder), gguf (one file), native (a folder of our own format), onnx (a graph in a folder).
        stored: type of most matrices: torch's name, or GGML's. file_type: llama.cpp's name of the mixture.
        weighted: whether the rounding can use an importance matrix.
        rounding: largest error of a matrix, relative to its root mean square.
        tolerance: what its readers are held to.
    """

    name: str
    form: Literal["hf", "gguf", "native", "onnx"]
    what: str
    stored: str
    rounding: float
    tolerance: Tolerance
    file_type: str = ""
    weighted: bool = False

    @property
    def compared(self) -> str:
        """How it is checked, in a sentence."""
        worst = "" if math.isinf(self.tolerance.worst) else f", none of a likely token over {self.tolerance.worst:g}"
        return (
            f"each matrix within {self.rounding:.2%} of the model's; a reader, against our model with the file's "
            f"weights: the likeliest token at {self.tolerance.agreement:.0%} of positions, mean log-probability "
            f"difference up to {self.tolerance.mean:g}{worst}"
        )


def _quantised(name: str, what: str, stored: str, rounding: float) -> ExportKind:
    return ExportKind(name, "gguf", what, stored, rounding, COARSE, f"MOSTLY_{name.upper()}", weighted=True)


# Rounding errors are about twice those of normal numbers: weights that matter little may be further off.
KINDS: dict[str, ExportKind] = {
    kind.name: kind
    for kind in (
        ExportKind("float32", "hf", "safetensors in fp32", "float32", 0.0, EXACT),
        ExportKind("bfloat16", "hf", "safetensors in bf16, as DeepSeek trains", "bfloat16", 0.004, EXACT),
        ExportKind("fp8", "hf", "safetensors in E4M3, one scale per 128 x 128 block", "float8_e4m3fn", 0.04, EXACT),
        ExportKind("f32", "gguf", "GGUF in fp32", "F32", 0.0, EXACT, "ALL_F32"),
        ExportKind("f16", "gguf", "GGUF in fp16", "F16", 0.001, HALF, "MOSTLY_F16"),
        ExportKind("bf16", "gguf", "GGUF in bf16", "BF16", 0.004, ROUNDED, "MOSTLY_BF16"),
        ExportKind("q8_0", "gguf", "GGUF, 8.5 bits a weight", "Q8_0", 0.01, ROUNDED, "MOSTLY_Q8_0"),
        _quantised("q6_k", "GGUF, 6.6 bits a weight", "Q6_K", 0.04),
        _quantised("q5_k_m", "GGUF, about 5.7 bits a weight, sensitive matrices more", "Q5_K", 0.08),
        _quantised("q5_k_s", "GGUF, 5.5 bits a weight", "Q5_K", 0.08),
        _quantised("q4_k_m", "GGUF, about 4.9 bits a weight, sensitive matrices more", "Q4_K", 0.16),
        _quantised("q4_k_s", "GGUF, about 4.6 bits a weight", "Q4_K", 0.16),
        _quantised("q3_k_m", "GGUF, about 3.9 bits a weight", "Q3_K", 0.32),
        _quantised("q2_k", "GGUF, about 3 bits a weight", "Q2_K", 0.6),
    )
}
ONNX = ExportKind("onnx", "onnx", "ONNX graph in fp32", "float32", 0.0, SAME)
