"""Cleaning, content hashes, the held-out split."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.shared.cleaning import (
    clean_text,
    content_hash,
    hash_fraction,
    validation_members,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a  \t\nb ", "a\nb"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("\x00a\x07b\ufeff\u200b", "ab"),
        ("e\u0301", "é"),
        ("\n\n  verse\n    indented\n\n", "  verse\n    indented"),
        (" \n\t\n", ""),
        ("page one\x0cpage two\x0bline\x85next\x1fword", "page one\npage two\nline\nnext word"),
    ],
)
def test_cleaning(raw, clean):
    assert clean_text(raw) == clean


@given(st.text())
def test_cleaning_again_changes_nothing(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert "\r" not in once and "\n\n\n" not in once


@given(st.text(), st.text())
def test_documents_have_one_hash_exactly_when_they_are_equal(a, b):
    assert (content_hash(a) == content_hash(b)) == (a == b)


hashes = st.lists(st.integers(0, 10**6).map(lambda i: content_hash(str(i))), unique=True)


@given(hashes, st.floats(0, 1))
def test_both_sides_of_the_split_get_a_document(digests, fraction):
    held = validation_members(digests, fraction)
    assert len(held) == len(digests)
    if len(digests) >= 2:
        assert any(held) and not all(held)


@given(hashes.filter(lambda d: len(d) >= 2), st.randoms())
def test_the_split_depends_on_hashes_not_on_order(digests, random):
    shuffled = list(digests)
    random.shuffle(shuffled)
    one = dict(zip(digests, validation_members(digests, 0.3), strict=True))
    assert one == dict(zip(shuffled, validation_members(shuffled, 0.3), strict=True))


def test_the_share_held_out_is_what_was_asked_for():
    digests = [content_hash(str(i)) for i in range(20_000)]
    assert all(0 <= hash_fraction(d) < 1 for d in digests)
    assert 0.045 < sum(validation_members(digests, 0.05)) / len(digests) < 0.055


def test_long_runs_of_blanks_are_cleaned_in_linear_time():
    start = time.process_time()
    assert clean_text("a" + " " * 400_000 + "b" + " \t" * 200_000) == "a" + " " * 400_000 + "b"
    assert time.process_time() - start < 2  # minutes, where every blank of a run is tried as its first
