"""Largest, smallest and order of several numbers, by comparing each with the best so far or by inserting it."""

from __future__ import annotations

import bisect
from random import Random

from ray_pipeline.data.tasks.question import Worked

LARGEST = ("Which is the largest of {}?", "Find the largest number: {}.")
SMALLEST = ("Which is the smallest of {}?", "Find the smallest number: {}.")
LARGER = ("Which is larger, {} or {}?", "What is the larger of {} and {}?", "Is {} or {} the larger number?")
SMALLER = ("Which is smaller, {} or {}?", "What is the smaller of {} and {}?", "Is {} or {} the smaller number?")
RISING = ("Put {} in order.", "Sort the numbers {}.")


def extreme_steps(numbers: list[int], largest: bool) -> str:
    """[34, 71, 58] -> "34<71 71>58": each number against the best of those before it."""
    steps, best = [], numbers[0]
    for other in numbers[1:]:
        steps.append(f"{best}{'<' if best < other else '>'}{other}")
        best = max(best, other) if largest else min(best, other)
    return " ".join(steps)


def insertion_steps(numbers: list[int]) -> str:
    """[58, 34, 71] -> "58;34 58;34 58 71": the sorted part after each insertion."""
    done: list[int] = []
    steps = []
    for value in numbers:
        bisect.insort(done, value)
        steps.append(" ".join(map(str, done)))
    return ";".join(steps)


def several(rng: Random, count: int, digits: int) -> list[int]:
    """Different numbers of `digits` digits; some share leading digits, so that the first one does not always decide."""
    low, high = 10 ** (digits - 1), 10**digits
    chosen: list[int] = []
    while len(chosen) < count:
        near = bool(chosen) and rng.random() < 0.3
        value = rng.choice(chosen) // 10 * 10 + rng.randrange(10) if near else rng.randrange(low, high)
        if value not in chosen:
            chosen.append(value)
    return chosen


def comparison(rng: Random, difficulty: int) -> Worked:
    """Level 1: extreme of three; 2: of four; 3: of five, three digits; 4: order of three or four; 5: order of five."""
    if difficulty <= 3:
        numbers = several(rng, difficulty + 2, 3 if difficulty == 3 else 2)
        largest = rng.random() < 0.5
        prompt = rng.choice(LARGEST if largest else SMALLEST)
        steps, answer = extreme_steps(numbers, largest), str(max(numbers) if largest else min(numbers))
    else:
        numbers = several(rng, rng.randint(3, 4) if difficulty == 4 else 5, 2)
        prompt = rng.choice(RISING)
        steps, answer = insertion_steps(numbers), ", ".join(map(str, sorted(numbers)))
    return Worked(prompt.format(", ".join(map(str, numbers))), steps, answer)


def pair(rng: Random, difficulty: int) -> Worked:
    """The larger or smaller of two numbers, of two digits at level 1 up to six."""
    a, b = several(rng, 2, difficulty + 1)
    larger = rng.random() < 0.5
    prompt = rng.choice(LARGER if larger else SMALLER).format(a, b)
    return Worked(prompt, f"{a}{'<' if a < b else '>'}{b}", str(max(a, b) if larger else min(a, b)))
