"""exact, length and repetition: properties of the text alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.rewards.exact import exact
from ray_pipeline.rewards.length import length
from ray_pipeline.rewards.repetition import NGRAM_WORDS, repetition
from ray_pipeline.tools.format import render_calls, render_output

CALLED = render_calls([("calculator", {"expression": "6*7"})]) + render_output("42")


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("<think>x</think> Paris ", "Paris", 1.0),
        ("<think>x</think>42", "40+2=42\n#### 42", 1.0),
        (f"<think>x</think>{CALLED}42", "42", 1.0),
        ("<think>x</think>paris", "Paris", 0.0),
        ("<think>x</think>42.0", "42", 0.0),
        (f"<think>x</think>{CALLED}", "42", 0.0),
        ("<think>42", "42", 0.0),
        ("", "", 0.0),
    ],
)
def test_exact_takes_the_references_letters_alone(completion, reference, value):
    assert exact("q", completion, reference) == value


@given(st.text("ab ", min_size=1, max_size=50), st.text("ab ", max_size=50))
def test_a_longer_answer_of_the_same_kind_scores_less(text, more):
    short, long = (f"<think>{thinking}</think>7" for thinking in (text, text + more))
    assert 0.0 < length("", long, "") <= length("", short, "") <= 1.0
    assert (length("", long, "") < length("", short, "")) == bool(more)


def test_a_thousand_characters_halve_and_no_answer_scores_nothing():
    assert length("", "x" * 1000, "") == 0.5
    assert length("", "x" * 2000, "") == 0.25
    for nothing in ("", "<think>", "<think>a</think>", "<think>a</think> \n", "<think>a</think>b<think>c"):
        assert length("", nothing, "") == 0.0


def test_a_tools_words_are_not_the_models():
    assert length("", f"{CALLED}7", "") == length("", "7", "")
    assert repetition("", CALLED * 50, "") == 0.0


@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_repetition_is_the_share_of_ngrams_seen_before(words):
    grams = [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]
    expected = len(set(grams)) / len(grams) - 1 if grams else 0.0
    assert repetition("", " ".join(words), "") == pytest.approx(expected, abs=1e-12)


def test_a_loop_is_punished_and_a_text_is_not():
    assert repetition("", " ".join(map(str, range(500))), "") == 0.0
    assert repetition("", "the same again " * 300, "") < -0.99
