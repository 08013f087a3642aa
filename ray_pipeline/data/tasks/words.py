"""Small word problems about counted things: the reader finds the operations, the steps are a running total."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from ray_pipeline.data.tasks.question import Worked

NAMES = ("Ann", "Ben", "Tom", "Sam", "Mia", "Max", "Eva", "Leo")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "shells", "stones")
PLACES = ("box", "bag", "basket")
PLURAL = {"box": "boxes", "bag": "bags", "basket": "baskets"}


def gain_or_loss(rng: Random, total: int, largest: int) -> tuple[str, str, int]:
    """A sentence that changes a count, its step, and the new count (never negative)."""
    n = rng.randint(2, largest)
    if total >= n and rng.random() < 0.5:
        sentence = rng.choice(("gives away {}", "loses {}", "sells {}")).format(n)
        return sentence, f"{total}-{n}={total - n}", total - n
    sentence = rng.choice(("gets {} more", "finds {} more", "buys {} more")).format(n)
    return sentence, f"{total}+{n}={total + n}", total + n


def one_change(rng: Random) -> Worked:
    """A count and one change."""
    name, thing, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(3, 30)
    change, step, total = gain_or_loss(rng, start, 20)
    return Worked(f"{name} has {start} {thing} and {change}. How many {thing} now?", step, str(total))


def two_changes(rng: Random) -> Worked:
    """A count and two changes."""
    name, thing, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 40)
    first, step1, total = gain_or_loss(rng, start, 20)
    second, step2, total = gain_or_loss(rng, total, 20)
    prompt = f"{name} has {start} {thing}, {first} and then {second}. How many {thing} now?"
    return Worked(prompt, f"{step1} {step2}", str(total))


def containers(rng: Random) -> Worked:
    """Equal groups, then one change."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    groups, each = rng.randint(2, 9), rng.randint(2, 9)
    change, step, total = gain_or_loss(rng, groups * each, 20)
    prompt = f"{name} has {groups} {PLURAL[place]} with {each} {thing} each and {change}. How many {thing} now?"
    return Worked(prompt, f"{groups}*{each}={groups * each} {step}", str(total))


def together(rng: Random) -> Worked:
    """Two people, the second described by the first."""
    (first, second), thing, a = rng.sample(NAMES, 2), rng.choice(THINGS), rng.randint(4, 40)
    if rng.random() < 0.3:
        relation, step, b = f"twice as many as {first}", f"{a}*2={a * 2}", a * 2
    else:
        n = rng.randint(2, 20)
        fewer = a > n and rng.random() < 0.5
        relation = f"{n} {'fewer' if fewer else 'more'} than {first}"
        b = a - n if fewer else a + n
        step = f"{a}{'-' if fewer else '+'}{n}={b}"
    prompt = f"{first} has {a} {thing}. {second} has {relation}. How many {thing} together?"
    return Worked(prompt, f"{step} {a}+{b}={a + b}", str(a + b))


def three_steps(rng: Random) -> Worked:
    """Equal groups, a change, and more equal groups."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    groups, each, more, size = (rng.randint(2, 9) for _ in range(4))
    change, step, total = gain_or_loss(rng, groups * each, 20)
    prompt = (
        f"{name} has {groups} {PLURAL[place]} with {each} {thing} each and {change}. "
        f"Then {more} {PLURAL[place]} with {size} {thing} each come. How many {thing} now?"
    )
    result = total + more * size
    steps = f"{groups}*{each}={groups * each} {step} {more}*{size}={more * size} {total}+{more * size}={result}"
    return Worked(prompt, steps, str(result))


LEVELS: tuple[Callable[[Random], Worked], ...] = (one_change, two_changes, containers, together, three_steps)


def word_problem(rng: Random, difficulty: int) -> Worked:
    """Level 1: one change; 2: two; 3: equal groups and a change; 4: two people; 5: three steps."""
    return LEVELS[difficulty - 1](rng)
