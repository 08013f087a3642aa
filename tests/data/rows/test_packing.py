"""Packing loses, doubles and leaks no token."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.rows.batch import IGNORE
from ray_pipeline.data.rows.loader import rows_to_batch
from ray_pipeline.data.rows.packing import best_fit, count_targets, pack_conversations, pack_documents

PAD = 0
lengths = st.lists(st.integers(1, 40), max_size=30)


def unique_documents(sizes):
    """Documents whose tokens are all different, so that each (token, next) pair tells where it came from."""
    start, out = 1, []
    for size in sizes:
        out.append(list(range(start, start + size)))
        start += size
    return out


def as_batch(rows):
    return rows_to_batch(*(np.stack([getattr(row, f) for row in rows]) for f in ("tokens", "segments", "mask")))


def trained_pairs(rows):
    """Every (input, target) pair that training would see."""
    if not rows:
        return Counter()
    batch = as_batch(rows)
    wanted = batch.labels != IGNORE
    return Counter(zip(batch.tokens[wanted].tolist(), batch.labels[wanted].tolist(), strict=True))


@given(lengths, st.integers(1, 17))
def test_pretraining_rows_hold_each_target_of_each_document_once(sizes, seq_len):
    documents = unique_documents(sizes)
    rows = list(pack_documents(documents, seq_len, PAD))
    expected = Counter(pair for d in documents for pair in itertools.pairwise(d))
    assert trained_pairs(rows) == expected
    assert sum(map(count_targets, rows)) == expected.total()


@given(lengths, st.integers(1, 17))
def test_segments_are_documents_in_order_and_never_mix(sizes, seq_len):
    documents = unique_documents(sizes)
    owner = {token: i for i, d in enumerate(documents) for token in d}
    for row in pack_documents(documents, seq_len, PAD):
        assert len(row.tokens) == len(row.segments) == len(row.mask) == seq_len + 1
        assert (np.diff(row.segments.astype(int)) >= 0).all()
        for segment in np.unique(row.segments):
            inside = row.tokens[row.segments == segment].tolist()
            if PAD in inside:
                assert set(inside) == {PAD} and not row.mask[row.segments == segment].any()
            else:
                assert len({owner[token] for token in inside}) == 1
                assert inside == list(range(inside[0], inside[0] + len(inside)))


def test_a_long_document_goes_on_with_one_token_of_overlap():
    rows = list(pack_documents([[1, 2, 3, 4, 5, 6, 7]], 3, PAD))
    assert [row.tokens.tolist() for row in rows] == [[1, 2, 3, 4], [4, 5, 6, 7]]


def test_rows_are_full_but_for_the_last():
    rows = list(pack_documents([list(range(1, 50)) for _ in range(40)], 16, PAD))
    assert all((row.tokens != PAD).sum() >= 16 for row in rows[:-1])


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_uses_every_item_once_and_never_overfills(sizes, capacity):
    groups = best_fit(sizes, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in group) for group in groups]
    assert all(0 < load <= capacity for load in loads)
    # Two rows that fit into one would be a wasted row.
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > capacity


def test_best_fit_takes_the_tightest_row():
    assert best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_best_fit_refuses_what_can_never_fit():
    with pytest.raises(ValueError, match=r"length 11 of item 1 is not within 1\.\.10"):
        best_fit([3, 11], 10)


conversations = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), max_size=25)


@given(conversations, st.integers(3, 16))
def test_conversations_are_whole_and_supervised_where_they_say(parts, seq_len):
    start, given_conversations = 1, []
    for prompt, answer in parts:
        ids = list(range(start, start + prompt + answer))
        given_conversations.append((ids, [0] * prompt + [1] * answer))
        start += prompt + answer
    rows, dropped = pack_conversations(given_conversations, seq_len, PAD)
    kept = [c for c in given_conversations if len(c[0]) <= seq_len + 1]
    assert dropped == len(given_conversations) - len(kept)
    segments = [
        row.tokens[row.segments == s].tolist()
        for row in rows
        for s in np.unique(row.segments)
        if row.tokens[row.segments == s].any()
    ]
    assert sorted(segments) == sorted(ids for ids, _ in kept)
    expected = Counter((ids[i - 1], ids[i]) for ids, mask in kept for i in range(1, len(ids)) if mask[i])
    assert trained_pairs(rows) == expected


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0], [1, 1]])
def test_a_conversation_without_a_target_is_refused(mask):
    with pytest.raises(ValueError, match="no supervised target"):
        pack_conversations([([1, 2, 3], mask)], 8, PAD)
