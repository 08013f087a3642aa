"""Which of torch's two matrix libraries suits this machine's processor, and in what sizes. Knows nothing of torch."""

from __future__ import annotations

from functools import cache
from math import log2
from pathlib import Path

LEAST = 2**21  # multiplications of a product, of fewer MKL's are quicker to start (measured)
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@cache
def onednn_is_quicker() -> bool:
    """Whether large products of fp32 are better oneDNN's than MKL's.

    MKL's AVX-512 kernels run on Intel's processors alone; others get those for AVX2 and take twice the time (measured
    on Zen 5). By what the processor is and not by a clock: every rank, and every resume, must round alike.
    """
    about = Path("/proc/cpuinfo")
    if not about.exists():
        return False
    text = about.read_text(encoding="utf-8")
    flags = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())
    return "GenuineIntel" not in text and flags >= _AVX512


def row_step(rows: float, *, bf16: bool) -> int:
    """What numbers of rows that change at every step are rounded up to for oneDNN, which compiles a kernel for each.

    A power of two near a sixteenth of the `rows` there are on average: a thirty-second is padding, and some tens of
    sizes come back again and again, however large a batch is. In fp32 no less than 64: finer steps bring nothing there
    but more kernels, a thirtieth of a small model's memory (measured).
    """
    return max(16 if bf16 else 64, 2 ** round(log2(max(rows, 1) / 16)))
