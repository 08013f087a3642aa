"""Thresholds of the operations that have fast forms. Knows nothing of torch: the memory estimates read them too."""

from __future__ import annotations

from functools import cache
from math import log2
from pathlib import Path

# Products. Multiplications from which oneDNN is quicker than MKL, which starts sooner: of two matrices as they lie, and
# of one that lies in oneDNN's own order already.
LEAST = 2**21
LEAST_ORDERED = 2**19
FEWEST = 4  # rows, of fewer MKL takes as long as reading the matrix does
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# Attention on the CPU.
BLOCK = 64  # queries that are computed at a time
PIECE = 128  # queries of a document that is computed alone
CALL = 4000  # pairs of a query and a key that are computed in the time it takes to start on a part
MASKED = 1.15  # what a pair costs in the fused kernel where a bias hides others
WORTH_CHOOSING = 128  # keys before the window: of fewer it is quicker to compute all
# Features of a head in fp32 from which products of blocks are quicker than the fused kernel by so much that it is worth
# keeping their probabilities: from 48 on by a twentieth of a training step.
WIDE = 64
LONGEST = 2048  # tokens in reach: probabilities take [seq, seq / 2] a head

# Cross-entropy. Bytes of logits at a time, by device: they stay in a CPU's cache, a GPU wants more work.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
FEWEST_ROWS = 256  # of a chunk, however wide the vocabulary
COLUMNS = {"cpu": 4096}  # of a chunk's product with its states, made at a time: what is added stays small
BLOCK_ELEMENTS = 2**18  # logits that a CPU works on at a time: 1 MB in fp32

# Routed experts while tokens are generated.
FEW_CHOICES = 8  # in all, up to which one product each beats sorting
# Superfluous operations that running every expert on every row may cost before sorting rows by expert is quicker: where
# two wide products are oneDNN's, they are quick enough for more.
WASTE, WASTE_BY_ONEDNN = 3_000_000, 160_000_000
DENSE_ROWS_ON_GPU = 32  # there nothing is sorted for so few rows: it would wait for the counts


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


def chunk_rows(device: str, vocab_size: int, element: int) -> int:
    """Rows whose logits are made at once, of `element` bytes each."""
    return max(FEWEST_ROWS, CHUNK_BYTES.get(device, 2**28) // (vocab_size * element))


def keeps_probabilities(width: int, v_dim: int, reach: int, *, bf16: bool, longest: int = LONGEST) -> bool:
    """Whether products of blocks, which keep attention's probabilities, are the quicker form, or the only one.

    Args:
        width, v_dim: features of a head's keys and of its values. reach: tokens that a query may see.
    """
    return v_dim > width or (reach <= longest and (bf16 or width >= WIDE))
