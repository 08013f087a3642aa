"""Arithmetic that is too long to do in one's head. The steps are the expression and its value."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from ray_pipeline.data.tasks.columns import number
from ray_pipeline.data.tasks.expressions import PHRASES
from ray_pipeline.data.tasks.question import Worked
from ray_pipeline.data.tasks.words import NAMES, PLACES, PLURAL, THINGS
from ray_pipeline.tools.calculator import evaluate, written

# Digits of both factors at levels 1 to 5.
_FACTORS = ((2, 3), (3, 3), (3, 4), (4, 4), (4, 5))


def long_product(rng: Random, difficulty: int) -> Worked:
    """Level 1: two digits times three; up to 5: four times five."""
    left, right = _FACTORS[difficulty - 1]
    expression = f"{number(rng, left)}*{number(rng, right)}"
    return _worked(rng.choice(PHRASES).format(expression), expression)


def long_sum(rng: Random, difficulty: int) -> Worked:
    """`difficulty` + 2 numbers of three or four digits, added and taken away; never below zero at the end."""
    terms = [number(rng, rng.randint(3, 4)) for _ in range(difficulty + 2)]
    expression, total = str(terms[0]), terms[0]
    for term in terms[1:]:
        sign = "-" if term <= total and rng.random() < 0.4 else "+"
        expression, total = f"{expression}{sign}{term}", total + term if sign == "+" else total - term
    return _worked(rng.choice(PHRASES).format(expression), expression)


def stock(rng: Random, difficulty: int) -> Worked:
    """Equal groups and what is lost of them or comes on top: the expression must be found in the words."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    groups, each = (number(rng, digits) for digits in _FACTORS[difficulty - 1])
    change = number(rng, 3)
    prompt = f"{name} has {groups} {PLURAL[place]} with {each} {thing} each"
    if groups * each >= change and rng.random() < 0.5:
        return _worked(f"{prompt} and sells {change}. How many {thing} now?", f"{groups}*{each}-{change}")
    return _worked(f"{prompt} and buys {change} more. How many {thing} now?", f"{groups}*{each}+{change}")


TOOL_REGISTRY: dict[str, Callable[[Random, int], Worked]] = {
    "long_product": long_product,
    "long_sum": long_sum,
    "stock": stock,
}


def _worked(prompt: str, expression: str) -> Worked:
    value = written(evaluate(expression))
    return Worked(prompt, f"{expression}={value}", value)
