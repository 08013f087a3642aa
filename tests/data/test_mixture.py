"""Mixtures: the shares of bytes are the weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.mixture import mixture_members

documents = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=200)


@given(documents, st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_shares_follow_weights_to_within_one_document(docs, weights):
    sources, sizes = [s for s, _ in docs], [n for _, n in docs]
    members = mixture_members(sources, sizes, weights)
    held, kept = [0] * 3, [0] * 3
    for source, size, member in zip(sources, sizes, members, strict=True):
        held[source] += size
        kept[source] += size * member
    present = [i for i in range(3) if held[i]]
    if not present:
        return
    assert any(kept[i] == held[i] for i in present), "no source was used up"
    unit = min(held[i] / weights[i] for i in present)
    for i in present:
        assert unit * weights[i] - 1e-6 <= kept[i] <= unit * weights[i] + 50 + 1e-6


@given(st.lists(st.integers(1, 9)), st.floats(0.001, 1000))
def test_one_source_is_kept_whole(sizes, weight):
    assert mixture_members([0] * len(sizes), sizes, [weight]) == [True] * len(sizes)


def test_the_first_documents_of_the_larger_source_stay():
    members = mixture_members([0, 0, 0, 0, 1], [10, 10, 10, 10, 10], [2.0, 1.0])
    assert members == [True, True, False, False, True]


@pytest.mark.parametrize("weights", [[1.0, 5.0]])
def test_an_empty_source_takes_nothing_from_the_others(weights):
    assert mixture_members([0, 0], [5, 5], weights) == [True, True]
