"""The answer reward accepts every way to write the right number and nothing else."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.rewards.answer import answer, extract, last_number, parse_number


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<think>6*7=42</think>42", "42"),
        ("<think>a</think>The answer is 42.", "42"),
        ("42", "42"),
        ("<think>x</think>1,234", "1234"),
        ("<think>x</think>$1,234.50", "1234.5"),
        ("<think>x</think>$-5", "-5"),
        ("<think>x</think>-$5", "-5"),
        ("<think>x</think>\N{MINUS SIGN}5", "-5"),
        ("<think>x</think>x = 7", "7"),
        ("<think>x</think>7", "x = 7"),
        ("<think>x</think>7 apples", "7"),
        ("<think>x</think>7cm.", "7"),
        ("<think>x</think>7", "7 apples"),
        ("<think>x</think>50%", "50"),
        ("<think>x</think>0.50", "1/2"),
        ("<think>x</think>\\boxed{\\frac{1}{2}}", "0.5"),
        ("<think>x</think>It is \\boxed{12} apples, not 13", "12"),
        ("<think>x</think>so\n#### 72", "He sold 48/2 = <<48/2=24>>24. 48+24=72\n#### 72"),
        ("<think>x</think>042", "42"),
        ("<think>x</think>5 - 3 = 2, so 5-3", "3"),
        ("<think>x</think>Paris", "paris"),
        ("<think>x</think> The answer is Paris. ", "PARIS"),
        ("<think>x</think>yes", "Yes."),
        ("<think>x</think>.5", "0.5"),
        ("<think>x</think>9", "9 (apples)"),
        ("<think>x</think>9 (apples)", "9"),
        ("<think>x</think>9 apples", "9 (red apples)"),
        ("<think>x</think>60", "60 km/h"),
        ("<think>x</think>9", "9\\text{ cm}"),
        ("<think>x</think>9 \\text{ cm}", "9"),
    ],
)
def test_right_answers_score_one(completion, reference):
    assert answer("q", completion, reference) == 1.0


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<think>42", "42"),
        ("<think>42</think>", "42"),
        ("<think>42</think>  \n", "42"),
        ("<think>42</think>43", "42"),
        ("<think>x</think>4 2", "42"),
        ("<think>x</think>42.0000001", "42"),
        ("<think>x</think>9", "9 (or 10)"),
        ("<think>x</think>8", "9 (apples)"),
        ("<think>x</think>0.3333", "1/3"),
        ("<think>x</think>\\boxed{12} or 13", "13"),
        ("<think>x</think>#### 12", "13"),
        ("<think>x</think>-42", "42"),
        ("<think>x</think>no", "yes"),
        ("<think>x</think>Paris or London", "London"),
        ("", "42"),
        ("", ""),
        ("<think>x</think>1/0", "1"),
        ("<think>x</think>", ""),
    ],
)
def test_wrong_answers_score_zero(completion, reference):
    assert answer("q", completion, reference) == 0.0


PIECES = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "\\boxed{",
                "}",
                "{",
                "#### ",
                "1/0",
                "-",
                "$",
                ",",
                ".",
                "\\frac{1}{0}",
                "9" * 5000,
                "١",
                "²",
            ]
        ),
    ),
    max_size=12,
).map("".join)


@given(PIECES, PIECES)
def test_never_raises_and_is_zero_or_one(completion, reference):
    assert answer("", completion, reference) in (0.0, 1.0)


@given(st.decimals(-(10**9), 10**9, places=3, allow_nan=False))
def test_every_way_to_write_a_number_is_read_exactly(value: Decimal):
    for text in (
        f"{value}",
        f"{value:,}",
        f"x = {value}",
        f"{value} cm",
        f"{value}%",
        f"\N{MINUS SIGN}{-value}" if value < 0 else f"{value}.",
    ):
        assert parse_number(text) == Fraction(value), text
        assert last_number(f"first 17, then {text}") == Fraction(value), text
    assert answer("", f"<think>so</think>It is \\boxed{{{value:,}}}.", str(value)) == 1.0


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_two_integers_match_only_if_equal(a, b):
    assert answer("", f"<think></think>{a}", str(b)) == float(a == b)


def test_the_last_stated_answer_counts():
    assert extract("\\boxed{1} no, \\boxed{2{3}}") == "2{3}"
    assert extract("#### 1\n#### 2") == "2"


def test_a_very_long_completion_is_marked_quickly():
    assert answer("", "<think>" + "1,234 " * 20000 + "</think>" + "(((" * 20000 + "- $" * 20000 + "; 7", "7") == 1.0
