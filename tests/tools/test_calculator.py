"""The calculator is exact, refuses all that is not arithmetic, and cannot be kept busy."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.tools.calculator import Calculator, CannotCompute, evaluate, written


def compute(expression: str) -> str:
    return Calculator().call({"expression": expression})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+1", "2"),
        ("0.1+0.2", "0.3"),
        ("(3+4)*2/5", "2.8"),
        ("1/3", "1/3"),
        ("-7//2", "-4"),
        ("-7 % 3", "2"),
        ("2^10", "1024"),
        ("2**-3", "0.125"),
        ("-2**2", "-4"),
        ("3×4÷2 − 1", "5"),
        ("1_000*3", "3000"),
        ("1.5e3", "1500"),
        ("sqrt(2.25)", "1.5"),
        ("max(1, 2.5, 2)", "2.5"),
        ("round(2.675, 2)", "2.68"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("floor(-1.5) + ceil(1.2) + abs(-3)", "3"),
        ("-0.05", "-0.05"),
    ],
)
def test_values_are_exact(expression, value):
    assert compute(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1/0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0**-1", "division by zero"),
        ("9**9**9", "too large"),
        ("2**2049", "too large"),
        ("10**600*10**600", "too large"),
        ("sqrt(2)", "not rational"),
        ("sqrt(-1)", "no real square root"),
        ("2**0.5", "not a whole number"),
        ("__import__('os').system('true')", "not arithmetic"),
        ("open('x')", "'x' is not a number"),
        ("exec(1)", "there is no function exec"),
        ("a+1", "not arithmetic"),
        ("(1).real", "not arithmetic"),
        ("[1 for x in (1,)]", "not arithmetic"),
        ("max(*(1, 2))", "not arithmetic"),
        ("round(1, 10**9)", "cannot round"),
        ("min()", "does not take 0 numbers"),
        ("1 if 1 else 2", "not arithmetic"),
        ("True", "True is not a number"),
        ("0x10", "0x10 is not a number"),
        ("", "not an arithmetic expression"),
        ("1,234", "not arithmetic"),
        ("(" * 400, "not an arithmetic expression"),
        ("-" * 499 + "1", ""),
        ("1" * 501, "more than 500 characters"),
    ],
)
def test_what_has_no_value_is_refused_with_a_reason(expression, reason):
    started = time.monotonic()
    try:
        compute(expression)
    except CannotCompute as error:
        assert reason in str(error)
    else:
        assert expression.startswith("---")  # an odd number of minus signs is arithmetic
    assert time.monotonic() - started < 2


@given(st.fractions(max_denominator=10**6))
def test_a_written_number_reads_back_as_itself(value):
    assert evaluate(written(value)) == value


OPERATORS = st.sampled_from(["+", "-", "*", "/", "//", "%"])


@given(st.lists(st.tuples(st.integers(0, 999), OPERATORS), min_size=1, max_size=6), st.integers(0, 99))
def test_integers_equal_pythons_own_arithmetic(terms, last):
    expression = "".join(f"{number}{operator}" for number, operator in terms) + str(last)
    exact = "".join(f"Fraction({number}){operator}" for number, operator in terms) + f"Fraction({last})"
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(CannotCompute, match="division by zero"):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@given(st.text(max_size=30) | st.text("0123456789+-*/^()%. e,", max_size=40))
def test_any_text_has_a_value_or_a_reason(text):
    try:
        assert isinstance(evaluate(text), Fraction)
    except CannotCompute as error:
        assert str(error)
