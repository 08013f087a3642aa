"""Built-in questions: right, deterministic, graded."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.tasks.columns import add_columns, subtract_columns
from ray_pipeline.data.tasks.comparisons import extreme_steps, insertion_steps
from ray_pipeline.data.tasks.mixes import (
    CATEGORIES,
    DIFFICULTIES,
    PROMPT_MIX,
    REGISTRY,
    SFT_MIX,
    Mix,
    draw_unique,
    make_question,
    question_at,
)

ARITHMETIC = re.compile(r"^[\d+\-*/()]+$")
questions = st.builds(
    lambda category, difficulty, seed: make_question(category, difficulty, Random(seed)),
    st.sampled_from(CATEGORIES),
    st.sampled_from(DIFFICULTIES),
    st.integers(0, 10**9),
)


def value(expression: str) -> float:
    assert ARITHMETIC.match(expression), expression
    return eval(expression)


def coefficients(side: str) -> tuple[int, float]:
    """(factor of x, constant) of one side of an equation: "5x+3", "x/4", "27"."""
    if "x" not in side:
        return 0, value(side)
    if side.startswith("x/"):
        return 0, 0.0
    factor, rest = re.fullmatch(r"(\d*)x(.*)", side).groups()
    return int(factor or 1), value(rest) if rest else 0.0


@given(questions)
def test_every_equality_in_the_steps_is_true(question):
    for step in re.split(r"[ ;]", question.steps):
        sides = [side for side in step.split("=") if side and "x" not in side]
        if len(sides) >= 2 and "<" not in step and ">" not in step:
            assert len({value(side) for side in sides}) == 1, (question, step)


@given(questions.filter(lambda q: q.category in ("addition", "subtraction", "expression")))
def test_answer_is_the_value_of_the_expression(question):
    expression = re.search(r"[\d(][\d+\-*()]+", question.prompt).group()
    assert value(expression) == int(question.answer)


@given(questions.filter(lambda q: q.category == "equation"))
def test_answer_solves_the_equation(question):
    left, right = re.search(r"(\S*x\S*?)=([\dx+]+)", question.prompt).groups()
    x = int(question.answer)
    if left.startswith("x/"):
        assert x == int(left[2:]) * int(right)
        return
    a, b = coefficients(left)
    c, d = coefficients(right)
    assert a * x + b == c * x + d


@given(questions.filter(lambda q: q.category == "comparison"))
def test_answer_is_the_extreme_or_the_order(question):
    numbers = [int(n) for n in re.findall(r"\d+", question.prompt)]
    assert len(set(numbers)) == len(numbers)
    if question.difficulty >= 4:
        assert question.answer == ", ".join(map(str, sorted(numbers)))
    else:
        wanted = max(numbers) if "largest" in question.prompt else min(numbers)
        assert int(question.answer) == wanted


@given(questions.filter(lambda q: q.category == "word_problem"))
def test_word_problem_uses_the_numbers_it_names_and_ends_in_its_answer(question):
    used = set(re.findall(r"\d+", question.steps))
    assert set(re.findall(r"\d+", question.prompt)) <= used
    assert question.steps.rpartition("=")[2] == question.answer
    assert int(question.answer) >= 0


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_column_digits_spell_the_result(a, b):
    high, low = max(a, b), min(a, b)
    *units, last = [step.partition("=")[2] for step in add_columns(a, b).split()]
    assert int(last + "".join(u[-1] for u in reversed(units))) == a + b
    difference = [step.partition("=")[2] for step in subtract_columns(high, low).split()]
    assert int("".join(reversed(difference))) == high - low


def test_columns_show_carry_and_borrow():
    assert add_columns(347, 285) == "7+5=12 4+8+1=13 3+2+1=6"
    assert subtract_columns(423, 158) == "13-8=5 12-5-1=6 4-1-1=2"


def test_subtraction_refuses_a_negative_result():
    with pytest.raises(ValueError, match="3-5 is negative"):
        subtract_columns(3, 5)


def test_comparison_steps_follow_the_best_so_far():
    assert extreme_steps([34, 71, 58], largest=True) == "34<71 71>58"
    assert extreme_steps([34, 71, 12], largest=False) == "34<71 34>12"
    assert insertion_steps([58, 34, 71]) == "58;34 58;34 58 71"


def test_a_question_depends_on_seed_stream_and_index_alone():
    alone = question_at(PROMPT_MIX, 7, "heldout", 123)
    draw_unique(SFT_MIX, 3, "other", 50)
    assert question_at(PROMPT_MIX, 7, "heldout", 123) == alone
    assert len({question_at(PROMPT_MIX, s, t, 5).prompt for s in range(4) for t in ("a", "b")}) == 8


def test_drawn_questions_are_different_and_avoid_the_excluded():
    first = draw_unique(PROMPT_MIX, 0, "a", 300)
    taken = {q.prompt for q in first}
    second = draw_unique(PROMPT_MIX, 0, "a", 300, exclude=taken)
    assert len(taken) == 300
    assert not taken & {q.prompt for q in second}


def test_a_longer_draw_begins_with_the_shorter_one():
    assert draw_unique(SFT_MIX, 1, "s", 200)[:50] == draw_unique(SFT_MIX, 1, "s", 50)


def test_an_exhausted_mix_gives_what_it_has():
    few = Mix({"comparison": 1.0}, (1.0, 0.0, 0.0, 0.0, 0.0))
    everything = {q.prompt for q in draw_unique(few, 0, "a", 2000)}
    assert len(draw_unique(few, 0, "a", 20, exclude=everything)) <= 20


def test_a_weight_of_zero_is_never_drawn():
    mix = Mix({"addition": 1.0, "equation": 0.0}, (0.0, 1.0, 0.0, 1.0, 0.0))
    drawn = draw_unique(mix, 0, "a", 200)
    assert {q.category for q in drawn} == {"addition"}
    assert {q.difficulty for q in drawn} == {2, 4}


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_level_needs_more_written_out(category):
    lengths = [
        sum(len(make_question(category, level, Random(i)).completion) for i in range(300)) for level in DIFFICULTIES
    ]
    assert lengths[0] < lengths[2] < lengths[4]


def test_unknown_category_and_level_are_refused():
    with pytest.raises(ValueError, match=r'no category "sums"; there are addition'):
        make_question("sums", 1, Random(0))
    with pytest.raises(ValueError, match="difficulty 6"):
        make_question("addition", 6, Random(0))


def test_mixes_name_registered_categories():
    assert set(CATEGORIES) == set(REGISTRY)


def test_completion_holds_steps_in_think_tags():
    question = make_question("addition", 1, Random(0))
    assert question.completion == f"<think>{question.steps}</think>{question.answer}"
    assert question.record() == {
        "prompt": question.prompt,
        "answer": question.answer,
        "category": "addition",
        "difficulty": 1,
    }
