"""Decontamination finds exactly the shared runs of words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.shared.decontaminate import Decontaminator, is_telling, words

sentences = st.lists(st.sampled_from(["a", "b", "c", "1"]), min_size=1, max_size=9).map(" ".join)


def by_definition(questions, ngram, text):
    """Every run of `ngram` words of every question, or all of a shorter one, searched for one by one."""
    found = words(text)
    for question in questions:
        asked = words(question)
        if len(asked) < ngram and not is_telling(asked):
            if any(words(line) == asked for line in text.split("\n")):
                return True
            continue
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


def test_a_question_that_everybody_says_costs_no_documents():
    finder = Decontaminator(["Why?", "What is your name?", "How are you?"], 12)
    assert not finder.contaminated("She asked him why. What is your name? he said, and she told him how are you spelt.")
    assert finder.contaminated("Hello\nwhy?\nBecause.") and finder.contaminated("WHAT IS YOUR NAME")


def test_chinese_questions_are_found_inside_longer_text():
    question = "小明有三个苹果，又买了五个苹果，现在他一共有多少个苹果？"
    finder = Decontaminator([question], 12)
    assert words("现在有3个, ok") == ["现", "在", "有", "3", "个", "ok"]
    assert finder.contaminated(f"老师问：{question}答案是八。")
    assert finder.contaminated("题目：小明有三个苹果，又买了五个苹果，然后走了")
    assert not finder.contaminated("小明有一只猫。他每天都去公园散步，现在他很高兴。")
