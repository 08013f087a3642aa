"""General reasoning: number sequences, sets, the calendar. (Ordering is `ray_pipeline.data.tasks.comparison`.)"""

from __future__ import annotations

import datetime
from random import Random

from ray_pipeline.evaluation.tasks.item import Problem

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
LETTERS = "ABCDEFGHIJKL"


def sequence(rng: Random, level: int) -> Problem:
    """The next term of a rule that grows with the level: constant step, two steps in turn, ratio, growing step, sum."""
    start, step = rng.randint(1, 20), rng.randint(2, 9)
    if level == 1:
        terms = [start + step * i for i in range(6)]
    elif level == 2:
        other = rng.randint(1, 9)
        terms = [start]
        for i in range(6):
            terms.append(terms[-1] + (other if i % 2 else step))
    elif level == 3:
        ratio = rng.randint(2, 3)
        terms = [rng.randint(1, 5)]
        for _ in range(5):
            terms.append(terms[-1] * ratio)
    elif level == 4:
        terms = [start]
        for i in range(6):
            terms.append(terms[-1] + step + i)
    else:
        terms = [rng.randint(1, 9), rng.randint(1, 9)]
        for _ in range(5):
            terms.append(terms[-1] + terms[-2])
    shown = ", ".join(map(str, terms[:-1]))
    return Problem(f"What comes next: {shown}, ...?", str(terms[-1]))


def sets(rng: Random, level: int) -> Problem:
    """Members or sizes of unions, intersections and differences."""
    size = 2 + level
    a, b = (sorted(rng.sample(range(1, 3 * size), size)) for _ in range(2))
    text = [f"{{{', '.join(map(str, s))}}}" for s in (a, b)]
    if level <= 2:
        return Problem(f"How many numbers are in both {text[0]} and {text[1]}?", str(len({*a} & {*b})))
    if level == 3:
        return Problem(f"How many different numbers are in {text[0]} and {text[1]} together?", str(len({*a} | {*b})))
    if level == 4:
        return Problem(f"What is the sum of the numbers in {text[0]} that are not in {text[1]}?", str(sum({*a} - {*b})))
    both, only_first, only_second = rng.randint(2, 15), rng.randint(2, 20), rng.randint(2, 20)
    neither = rng.randint(1, 9)
    total = both + only_first + only_second + neither
    return Problem(
        f"Of {total} pupils {both + only_first} play chess, {both + only_second} play football and {neither} play "
        "neither. How many play both?",
        str(both),
    )


def calendar(rng: Random, level: int) -> Problem:
    """Weekdays and days between dates of a year that is not a leap year."""
    today, days = rng.randrange(7), rng.randint(2, 6)
    if level == 1:
        return Problem(f"Today is {DAYS[today]}. Which day is it in {days} days?", DAYS[(today + days) % 7])
    if level == 2:
        days = rng.randint(8, 60)
        return Problem(f"Today is {DAYS[today]}. Which day is it in {days} days?", DAYS[(today + days) % 7])
    if level == 3:
        days = rng.randint(8, 100)
        return Problem(f"Today is {DAYS[today]}. Which day was it {days} days ago?", DAYS[(today - days) % 7])
    first, second = sorted(rng.sample(range(365), 2))
    a, b = (datetime.date(2023, 1, 1) + datetime.timedelta(days=d) for d in (first, second))
    names = [f"{MONTHS[d.month - 1]} {d.day}" for d in (a, b)]
    if level == 4:
        return Problem(f"In a year of 365 days, how many days are from {names[0]} to {names[1]}?", str(second - first))
    text = f"In a year of 365 days, {names[0]} is a {DAYS[today]}. Which day of the week is {names[1]}?"
    return Problem(text, DAYS[(today + second - first) % 7])


def letters(rng: Random, level: int) -> Problem:
    """Where something ends up after swaps: following a state through steps."""
    boxes = list(LETTERS[: 2 + level])
    ball = rng.randrange(len(boxes))
    start, moves = boxes[ball], []
    for _ in range(level + 1):
        i, j = sorted(rng.sample(range(len(boxes)), 2))
        moves.append(f"{boxes[i]} and {boxes[j]}")
        ball = j if ball == i else i if ball == j else ball
    text = f"A ball is under cup {start}. What is under these cups changes places in turn: {'; '.join(moves)}."
    return Problem(f"{text} Under which cup is the ball? Answer with its letter.", boxes[ball])
