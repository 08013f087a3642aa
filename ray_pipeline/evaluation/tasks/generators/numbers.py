"""Arithmetic beyond sums: products, division with remainder, powers, fractions."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from random import Random

from ray_pipeline.evaluation.tasks.item import Problem


def multiplication(rng: Random, level: int) -> Problem:
    """Level 1: one digit by one; then one more digit in turn."""
    digits = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))[level - 1]
    a, b = (rng.randrange(max(2, 10 ** (d - 1)), 10**d) for d in digits)
    return Problem(f"What is {a}*{b}?", str(a * b))


def division(rng: Random, level: int) -> Problem:
    """Whole quotients up to level 3, then remainders."""
    b, quotient = rng.randint(2, 9 if level < 3 else 30), rng.randint(2, (9, 30, 90, 90, 400)[level - 1])
    if level <= 3:
        return Problem(f"What is {b * quotient}/{b}?", str(quotient))
    rest = rng.randrange(1, b)
    return Problem(f"What is the remainder of {b * quotient + rest} divided by {b}?", str(rest))


def powers(rng: Random, level: int) -> Problem:
    """Squares, cubes, roots."""
    if level <= 2:
        base = rng.randint(2, 9 if level == 1 else 25)
        return Problem(f"What is {base}^2?", str(base**2))
    if level == 3:
        root = rng.randint(2, 30)
        return Problem(f"What is the square root of {root**2}?", str(root))
    base, power = rng.randint(2, 9), rng.randint(3, 4 if level == 4 else 5)
    return Problem(f"What is {base}^{power}?", str(base**power))


def fractions(rng: Random, level: int) -> Problem:
    """Sums with one denominator, then with two, then products and quotients; the answer is in lowest terms."""
    while True:
        b = rng.randint(2, 9)
        d = b if level <= 2 else rng.randint(2, 12)
        a, c = rng.randint(1, b), rng.randint(1, d)
        if gcd(a, b) == gcd(c, d) == 1:
            break
    sign = "+-"[rng.randrange(2)] if level <= 3 else "*" if level == 4 else ":"
    x, y = Fraction(a, b), Fraction(c, d)
    value = {"+": x + y, "-": x - y, "*": x * y, ":": x / y}[sign]
    word = {"+": "plus", "-": "minus", "*": "times", ":": "divided by"}[sign]
    return Problem(f"What is {a}/{b} {word} {c}/{d}? Give a fraction in lowest terms.", str(value))
