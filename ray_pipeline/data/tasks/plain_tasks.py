"""Questions as a newcomer types them first: which of two numbers is larger, and sums with a product at their end."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from ray_pipeline.data.tasks.columns import number
from ray_pipeline.data.tasks.comparisons import several
from ray_pipeline.data.tasks.expressions import PHRASES
from ray_pipeline.data.tasks.question import Worked

LARGER = ("Which is larger, {} or {}?", "What is the larger of {} and {}?", "Is {} or {} the larger number?")
SMALLER = ("Which is smaller, {} or {}?", "What is the smaller of {} and {}?", "Is {} or {} the smaller number?")
_DIGITS = (2, 3, 4, 5, 6)  # of the numbers at levels 1 to 5


def pair(rng: Random, difficulty: int) -> Worked:
    """The larger or smaller of two numbers of 2 to 6 digits."""
    a, b = several(rng, 2, _DIGITS[difficulty - 1])
    larger = rng.random() < 0.5
    prompt = rng.choice(LARGER if larger else SMALLER).format(a, b)
    return Worked(prompt, f"{a}{'<' if a < b else '>'}{b}", str(max(a, b) if larger else min(a, b)))


def product_last(rng: Random, difficulty: int) -> Worked:
    """a+b*c: the product comes first. Level 1: a of one digit, up to 5: of five."""
    a, b, c = number(rng, difficulty), rng.randint(2, 9), rng.randint(2, 9)
    steps = f"{b}*{c}={b * c} {a}+{b * c}={a + b * c}"
    return Worked(rng.choice(PHRASES).format(f"{a}+{b}*{c}"), steps, str(a + b * c))


PLAIN_REGISTRY: dict[str, Callable[[Random, int], Worked]] = {"pair": pair, "product_last": product_last}
