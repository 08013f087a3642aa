"""Mixtures: the shares of bytes are the weights, and without weights everything is used once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.text.mixture import epochs

sources = st.lists(st.tuples(st.integers(0, 10**6), st.floats(0.1, 10)), min_size=1, max_size=6)


@given(sources, st.floats(1, 8))
def test_shares_follow_weights_and_no_source_is_repeated_too_often(given, most):
    sizes, weights = [size for size, _ in given], [weight for _, weight in given]
    found = epochs(sizes, weights, most)
    assert [bool(times) for times in found] == [bool(size) for size in sizes]
    present = [i for i, size in enumerate(sizes) if size]
    if len(present) < 2:
        return
    units = [found[i] * sizes[i] / weights[i] for i in present]
    assert max(units) == pytest.approx(min(units))
    assert max(found) <= most * (1 + 1e-9)
    assert max(found) >= 1 - 1e-9, "one source at least is used whole"


@given(st.lists(st.integers(1, 10**6), max_size=6))
def test_without_weights_everything_is_used_once(sizes):
    assert epochs(sizes, [None] * len(sizes), 4) == [1.0] * len(sizes)


@pytest.mark.parametrize(
    ("sizes", "weights", "most", "expected"),
    [
        ([300], [7.0], 4, [1.0]),
        ([300, 100], [3.0, 1.0], 4, [1.0, 1.0]),
        ([300, 100], [1.0, 1.0], 4, [1.0, 3.0]),  # the small one is repeated
        ([900, 100], [1.0, 1.0], 4, [400 / 900, 4.0]),  # so often and no more: of the large one a part is left out
        ([900, 100], [1.0, 1.0], 1, [100 / 900, 1.0]),
        ([0, 100, 0], [1.0, 1.0, 5.0], 4, [0.0, 1.0, 0.0]),
    ],
)
def test_what_is_repeated_and_what_is_left_out(sizes, weights, most, expected):
    assert epochs(sizes, weights, most) == pytest.approx(expected)
