"""Which questions are asked when."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.rollouts.prompt_order import PromptOrder
from ray_pipeline.settings.section import MOST_SEED


@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_every_question_is_asked_once_an_epoch_however_many_are_asked_at_a_time(questions, seed, counts):
    order, asked, place = PromptOrder(questions, seed), [], 0
    for count in counts:
        asked += order.at(place, count)
        place += count
    for start in range(0, len(asked) - questions + 1, questions):
        assert Counter(asked[start : start + questions]) == Counter(range(questions))


@given(st.integers(2, 40), st.integers(0, 99), st.integers(1, 50))
def test_a_place_does_not_depend_on_what_was_asked_before(questions, place, count):
    used = PromptOrder(questions, 3)
    for earlier in range(0, place, 7):
        used.at(earlier, 3)
    assert PromptOrder(questions, 3).at(place, count) == used.at(place, count)


def test_seeds_and_epochs_differ():
    order = PromptOrder(50, 0)
    assert order.at(0, 50) != order.at(50, 50) and order.at(0, 50) != PromptOrder(50, 1).at(0, 50)


@pytest.mark.parametrize("seed", [2 * 10**13, MOST_SEED - 1, MOST_SEED])
def test_large_seeds_ask_every_question_once_an_epoch_too(seed):
    order = PromptOrder(7, seed)
    asked = order.at(0, 21)
    assert all(Counter(asked[start : start + 7]) == Counter(range(7)) for start in (0, 7, 14))
    assert asked != PromptOrder(7, seed - 2).at(0, 21)


def test_nothing_to_ask_is_refused():
    with pytest.raises(ValueError, match="0 questions"):
        PromptOrder(0, 0)
