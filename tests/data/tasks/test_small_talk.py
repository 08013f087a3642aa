"""Small talk and plain questions: what SFT shows of them, and what it never shows."""

from __future__ import annotations

import re
from random import Random

import pytest

from ray_pipeline.data.sets.question_sets import gather_questions
from ray_pipeline.data.tasks.mixes import CHAT_MIX, draw_unique, make_question
from ray_pipeline.data.tasks.small_talk import _UNSEEN, OUTSIDE, exchange, unseen_questions
from ray_pipeline.settings.schema import PipelineFields


@pytest.mark.parametrize("difficulty", range(1, 6))
def test_plain_questions_are_right(difficulty):
    for seed in range(200):
        pair = make_question("pair", difficulty, Random(seed))
        a, b = map(int, re.findall(r"\d+", pair.prompt))
        assert a != b and len(str(a)) == len(str(b)) == difficulty + 1
        assert int(pair.answer) == (max if "larger" in pair.prompt else min)(a, b)
        assert eval(pair.steps) is True
        last = make_question("product_last", difficulty, Random(seed))
        assert int(last.answer) == eval(re.search(r"\d[\d+*]+", last.prompt).group())
        for step in last.steps.split():
            left, right = step.split("=")
            assert eval(left) == int(right)


def test_topics_that_are_kept_for_evaluation_are_in_no_exchange():
    said = [exchange(Random(index)) for index in range(5000)]
    assert not [text for text, _ in said for topic in _UNSEEN if topic in text]
    asked = unseen_questions(100, seed=0)
    assert len({text for text, _ in asked}) == 100 and {answer for _, answer in asked} == {OUTSIDE}
    assert not {text for text, _ in asked} & {text for text, _ in said}
    assert len(unseen_questions(10**6, seed=0)) == 200


def test_the_built_in_chat_has_small_talk_and_several_turns():
    data = {"sft": "builtin_chat", "prompts": "builtin_chat", "builtin_conversations": 1000, "builtin_prompts": 200}
    sets = gather_questions(PipelineFields.model_validate({"data": data}))
    assert {q.category for q in sets.train} == set(CHAT_MIX.categories)
    turns = [[message["content"] for message in c.messages] for c in sets.conversations]
    asked, answers = [text for one in turns for text in one[::2]], [text for one in turns for text in one[1::2]]
    assert sum(answer.startswith("<think>") for answer in answers) == 1000
    talk = [answer for answer in answers if "<think>" not in answer]
    assert len(talk) == pytest.approx(100, abs=30) and talk.count(OUTSIDE) == pytest.approx(0.6 * len(talk), abs=25)
    lengths = [len(one) // 2 for one in turns]
    assert set(lengths) == {1, 2, 3} and lengths.count(1) == pytest.approx(len(turns) / 2, abs=50)
    assert not set(asked) & ({q.prompt for q in sets.heldout} | {q.prompt for q in sets.train})
    assert turns == [[m["content"] for m in c.messages] for c in gather_questions(
        PipelineFields.model_validate({"data": data})).conversations]  # fmt: skip


def test_questions_of_the_plain_kind_are_half_as_frequent_as_the_others():
    drawn = draw_unique(CHAT_MIX, 0, "a", 2000)
    plain = sum(q.category in ("pair", "product_last") for q in drawn)
    assert plain / len(drawn) == pytest.approx(1.0 / 6.5, abs=0.03)
