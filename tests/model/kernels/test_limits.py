"""Sizes that oneDNN's kernels are compiled for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.kernels.limits import row_step


@given(st.floats(0, 1e9), st.booleans())
def test_rows_are_padded_by_a_thirty_second_of_what_there_are(rows: float, bf16: bool) -> None:
    step, least = row_step(rows, bf16=bf16), 16 if bf16 else 64
    assert step >= least and step & (step - 1) == 0
    if rows >= 16 * least:
        assert rows / 23 < step < rows / 11  # half of it is padding
