"""llama.cpp's own quantiser, as the `xllamacpp` package brings it. numpy alone; nothing is loaded before it is asked.

The package has no Python name for it, so its C function is called:
`size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)` of ggml.h.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

_THREADS = 4  # matrices of a stack that are rounded side by side; the C function leaves Python's lock alone


class QuantiserMissing(ValueError):
    """llama.cpp is not installed, or not with its quantiser; the message says what to do."""


@functools.cache
def _quantise_chunk() -> Any:
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        raise QuantiserMissing(
            "K-quants are made by llama.cpp's quantiser: pip install 'ray-pipeline[llama]', or choose f32, f16, bf16 "
            "or q8_0."
        ) from None
    function = getattr(ctypes.CDLL(xllamacpp.__file__), "ggml_quantize_chunk", None)
    if function is None:
        raise QuantiserMissing(
            "the installed xllamacpp does not show llama.cpp's quantiser (ggml_quantize_chunk). Install the version "
            "that constraints.txt names, or choose f32, f16, bf16 or q8_0."
        )
    function.restype = ctypes.c_size_t
    function.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    return function


def check_quantiser() -> None:
    """Refuse before a file is begun.

    Raises:
        QuantiserMissing: K-quants cannot be made here.
    """
    _quantise_chunk()


def quantise(values: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """Matrices rounded to a GGML type: fp32 [..., rows, columns] -> bytes [..., rows, bytes of a row].

    Args:
        kind: GGML's name, as Q4_K; `columns` must be a multiple of its block.
        importance: [..., columns], how much each feature of the input of each matrix weighs, none negative; a matrix
            with nothing but zeros is rounded without. None: all are.
    Raises:
        QuantiserMissing: see there.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    function, number = _quantise_chunk(), GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    rows, columns = values.shape[-2:]
    stack = np.ascontiguousarray(values, np.float32).reshape(-1, rows, columns)
    out = np.zeros((len(stack), rows, columns // block * size), np.uint8)
    weights = None if importance is None else _floored(importance.reshape(-1, columns))
    assert weights is None or len(weights) == len(stack), "one row of importance for each matrix"

    def one(i: int) -> int:
        given = None if weights is None or not weights[i].any() else weights[i].ctypes.data
        return int(function(int(number), stack[i].ctypes.data, out[i].ctypes.data, 0, rows, columns, given))

    with ThreadPoolExecutor(_THREADS) as threads:
        written = sum(threads.map(one, range(len(stack))))
    assert written == out.nbytes, f"{kind}: {written} bytes, not {out.nbytes}"
    return out.reshape(*values.shape[:-1], -1)


def _floored(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """A feature that was never active still has a millionth of the mean: blocks without any weight have no scale."""
    mean = importance.mean(-1, keepdims=True)
    return np.ascontiguousarray(np.maximum(importance, 1e-6 * mean), np.float32)
