"""Sums and differences of many-digit numbers, worked column by column from the right with carries and borrows."""

from __future__ import annotations

from random import Random

from ray_pipeline.data.tasks.question import Worked

PHRASES = ("What is {}?", "Work out {}.", "{} = ?")


def number(rng: Random, digits: int) -> int:
    """A number of exactly `digits` digits, uniformly."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 1, 10**digits)


def add_columns(a: int, b: int) -> str:
    """347+285 -> "7+5=12 4+8+1=13 3+2+1=6": one sum per column, the carry as a third term."""
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return " ".join(steps)


def subtract_columns(a: int, b: int) -> str:
    """423-158 -> "13-8=5 12-5-1=6 4-1-1=2": a column that is too small borrows ten, the next one pays it back.

    Raises:
        ValueError: when b > a.
    """
    if b > a:
        raise ValueError(f"{a}-{b} is negative")
    steps, borrow = [], 0
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        paid = "-1" if borrow else ""
        top = x + 10 if x - y - borrow < 0 else x
        steps.append(f"{top}-{y}{paid}={top - y - borrow}")
        borrow = int(top != x)
    return " ".join(steps)


def addition(rng: Random, difficulty: int) -> Worked:
    """Two numbers, the larger of difficulty+1 digits."""
    digits = difficulty + 1
    pair = [number(rng, digits), number(rng, rng.choice((digits, digits, digits - 1)))]
    rng.shuffle(pair)
    a, b = pair
    return Worked(rng.choice(PHRASES).format(f"{a}+{b}"), add_columns(a, b), str(a + b))


def subtraction(rng: Random, difficulty: int) -> Worked:
    """A number of difficulty+1 digits less a smaller one; never negative."""
    digits = difficulty + 1
    b, a = sorted((number(rng, digits), number(rng, rng.choice((digits, digits, digits - 1)))))
    return Worked(rng.choice(PHRASES).format(f"{a}-{b}"), subtract_columns(a, b), str(a - b))
