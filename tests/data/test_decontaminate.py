"""Decontamination finds exactly the shared runs of words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.decontaminate import Decontaminator, words

sentences = st.lists(st.sampled_from(["a", "b", "c", "1"]), min_size=1, max_size=9).map(" ".join)


def by_definition(questions, ngram, text):
    """Every run of `ngram` words of every question, or all of a shorter one, searched for one by one."""
    found = words(text)
    for question in questions:
        asked = words(question)
        size = min(ngram, len(asked))
        runs = [asked[i : i + size] for i in range(len(asked) - size + 1)]
        if any(found[i : i + size] == run for run in runs for i in range(len(found) - size + 1)):
            return True
    return False


@given(st.lists(sentences, max_size=4), st.integers(1, 5), sentences)
def test_equals_the_plain_search(questions, ngram, text):
    assert Decontaminator(questions, ngram).contaminated(text) == by_definition(questions, ngram, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Well: WHAT is 347 + 285? It is 632.", True),
        ("What is 347-285?", False),
        ("What is 1347+285?", False),
        ("347+285 is what?", False),
    ],
)
def test_a_short_question_counts_as_a_whole(text, found):
    assert Decontaminator(["What is 347+285?"], 12).contaminated(text) == found


def test_a_long_question_is_found_by_a_part():
    question = "Ann has three boxes of old red pens and gives half of all the pens to her friend Tom today"
    finder = Decontaminator([question], 8)
    assert finder.contaminated("... gives half of all the pens to her dog")
    assert not finder.contaminated("gives half of all the shells to her friend Tom today")


@pytest.mark.parametrize("questions", [[], [""], ["?!"]])
def test_nothing_to_look_for_finds_nothing(questions):
    assert not Decontaminator(questions, 3).contaminated("anything ?! at all")
