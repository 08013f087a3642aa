"""Several operations in one line, worked one at a time: products first, then a running total. Never negative."""

from __future__ import annotations

from random import Random

from ray_pipeline.data.tasks.question import Worked

PHRASES = ("What is {}?", "Work out {}.", "Find the value of {}.")


def running_total(start: int, terms: list[tuple[str, int]]) -> tuple[str, int]:
    """Steps and value of start ± t1 ± t2 ...: "3+5=8 8-2=6"."""
    steps, total = [], start
    for sign, term in terms:
        result = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return " ".join(steps), total


def signed_terms(rng: Random, start: int, count: int, largest: int) -> list[tuple[str, int]]:
    """`count` terms of 1..largest with signs that keep the running total at zero or above."""
    terms: list[tuple[str, int]] = []
    total = start
    for _ in range(count):
        term = rng.randint(1, largest)
        sign = "-" if term <= total and rng.random() < 0.5 else "+"
        total += term if sign == "+" else -term
        terms.append((sign, term))
    return terms


def sums(rng: Random, count: int, largest: int) -> tuple[str, str, int]:
    """A chain of `count` additions and subtractions."""
    start = rng.randint(1, largest)
    terms = signed_terms(rng, start, count, largest)
    steps, value = running_total(start, terms)
    return f"{start}" + "".join(f"{s}{t}" for s, t in terms), steps, value


def product_and_sum(rng: Random, count: int) -> tuple[str, str, int]:
    """a*b followed by `count` additions and subtractions."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    terms = signed_terms(rng, a * b, count, 20)
    steps, value = running_total(a * b, terms)
    return f"{a}*{b}" + "".join(f"{s}{t}" for s, t in terms), f"{a}*{b}={a * b} {steps}", value


def two_products(rng: Random) -> tuple[str, str, int]:
    """a*b+c*d, or with a minus where that stays positive."""
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    sign = "-" if a * b >= c * d and rng.random() < 0.5 else "+"
    steps, value = running_total(a * b, [(sign, c * d)])
    return f"{a}*{b}{sign}{c}*{d}", f"{a}*{b}={a * b} {c}*{d}={c * d} {steps}", value


def bracket(rng: Random) -> tuple[str, str, int]:
    """a*(b+c)±d."""
    a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    terms = signed_terms(rng, a * (b + c), 1, 20)
    steps, value = running_total(a * (b + c), terms)
    sign, d = terms[0]
    return f"{a}*({b}+{c}){sign}{d}", f"{b}+{c}={b + c} {a}*{b + c}={a * (b + c)} {steps}", value


def expression(rng: Random, difficulty: int) -> Worked:
    """Level 1: three small numbers; 2: four up to 20; 3: a product first; 4: two products, or a bracket; 5: longer."""
    if difficulty == 1:
        text, steps, value = sums(rng, 2, 9)
    elif difficulty == 2:
        text, steps, value = sums(rng, 3, 20)
    elif difficulty == 3:
        text, steps, value = product_and_sum(rng, rng.randint(1, 2))
    elif difficulty == 4:
        text, steps, value = two_products(rng) if rng.random() < 0.5 else bracket(rng)
    else:
        text, steps, value = sums(rng, 4, 60) if rng.random() < 0.5 else product_and_sum(rng, 3)
    return Worked(rng.choice(PHRASES).format(text), steps, str(value))


def product_last(rng: Random, difficulty: int) -> Worked:
    """a+b*c, whose product comes first; a has as many digits as the level."""
    a, b, c = rng.randrange(10 ** (difficulty - 1), 10**difficulty), rng.randint(2, 9), rng.randint(2, 9)
    steps = f"{b}*{c}={b * c} {a}+{b * c}={a + b * c}"
    return Worked(rng.choice(PHRASES).format(f"{a}+{b}*{c}"), steps, str(a + b * c))
