"""Arithmetic in an answer's working is found and computed again, exactly."""

from __future__ import annotations

import time
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.tasks.mixes import DIFFICULTIES, make_question
from ray_pipeline.evaluation.self_check import SelfCheck, evaluate, self_check


def holds(check: SelfCheck) -> bool:
    """At least one statement, and all of them right."""
    return 0 < check.steps == check.right


def verifies(check: SelfCheck) -> bool:
    """The working holds and gives the final result."""
    return holds(check) and check.recomputes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("12/4/3", 1),
        ("1/3", Fraction(1, 3)),
        ("-5+3", -2),
        ("2*-3", -6),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("0.2*50", 10),
        (" 7 ", 7),
        ("1/0", None),
        ("2+", None),
        ("(2+3", None),
        ("2 3", None),
        ("2^1000", None),
        ("x+1", None),
        ("", None),
        ("0^-1", None),
        ("(" * 300 + "1" + ")" * 300, None),
    ],
)
def test_expressions_have_their_value(text: str, value: int | Fraction | None) -> None:
    assert evaluate(text) == value


@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.builds(
    lambda a, sign, b: f"({a}){sign}({b})", inner, st.sampled_from("+-*"), inner), max_leaves=12))  # fmt: skip
def test_expressions_have_pythons_value(text: str) -> None:
    assert evaluate(text) == eval(text)


@given(st.text(alphabet="0123456789+-*/^()=. x$,<think>/", max_size=60))
def test_babble_is_no_error(text: str) -> None:
    check = self_check(text)
    assert 0 <= check.right <= check.steps


def test_long_babble_takes_no_time() -> None:
    for text in ("1" * 50_000, "1 " * 20_000, "=" * 20_000, "(" * 20_000, " " * 50_000 + "=", "1,111" * 9_000):
        started = time.perf_counter()
        self_check(text)
        assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize(
    ("text", "steps", "right"),
    [
        ("7+5=12 4+8+1=13 3+2+1=6", 3, 3),
        ("x=35-5=30 x=30/5=6", 2, 2),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs", 1, 1),
        ("He pays 9 * 2 = $18 a day.", 1, 1),
        ("1,200+300 = 1,500", 1, 1),
        ("10/3 = 3.33, or 10/3=3.4", 2, 1),
        ("10/3 = 3", 1, 0),
        ("3x+5=20 and 2x=10", 0, 0),
        ("20=3x+5", 0, 0),
        ("2*3=6x", 0, 0),
        ("12=12", 0, 0),
        ("2+2=5", 1, 0),
        ("2+2=4=3+1", 1, 1),
        ("5*(4+4)=40 40-6=34", 2, 2),
        ("4×5=20, 9−4=5, 8÷2=4", 3, 3),
    ],
)
def test_statements_are_found_and_checked(text: str, steps: int, right: int) -> None:
    found = self_check(f"<think>{text}</think>0")
    assert (found.steps, found.right) == (steps, right)


def test_an_answer_verifies_itself_when_right_work_gives_its_result() -> None:
    assert self_check("<think>3*4=12 12-5=7</think>7") == SelfCheck(2, 2, recomputes=True, reflects=False)
    assert verifies(self_check("<think>3*4=12 12-5=7</think>7"))
    assert not verifies(self_check("<think>3*4=13 12-5=7</think>7")), "a wrong step"
    assert not verifies(self_check("<think>3*4=12 12-5=7</think>8")), "another result"
    assert not holds(self_check("<think>At a glance.</think>7")), "no step"
    assert not verifies(self_check("<think>12-5=7")), "no answer"
    assert verifies(self_check("12-5=7, so the answer is 7")), "work without thinking marks"


@pytest.mark.parametrize(
    ("text", "reflects"),
    [
        ("Wait, that is off.", True),
        ("Let me check: 2+2=4", True),
        ("I double-check it.", True),
        ("He waits for Anna.", False),
        ("2+2=4", False),
    ],
)
def test_phrases_of_doubt_are_found(text: str, reflects: bool) -> None:
    assert self_check(f"<think>{text}</think>4").reflects is reflects


@pytest.mark.parametrize("category", ["expression", "word_problem", "addition", "subtraction"])
def test_the_training_datas_own_working_holds(category: str) -> None:
    for level in DIFFICULTIES:
        for seed in range(20):
            question = make_question(category, level, Random(seed))
            check = self_check(question.completion)
            assert holds(check), question.completion
            # Columns give digits; a chain of operations ends with the result.
            assert verifies(check) or category in ("addition", "subtraction")
