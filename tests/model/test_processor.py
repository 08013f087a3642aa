"""Sizes that oneDNN's kernels are compiled for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.processor import row_step


@given(st.floats(0, 1e9))
def test_rows_are_padded_by_a_thirty_second_of_what_there_are(rows: float) -> None:
    step = row_step(rows)
    assert step >= 16 and step & (step - 1) == 0
    if rows >= 256:
        assert rows / 23 < step < rows / 11  # half of it is padding
