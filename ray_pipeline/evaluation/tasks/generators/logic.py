"""Logic: truth values, chains of inclusion, orders from comparisons, knights and knaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

from ray_pipeline.evaluation.tasks.item import Problem

NAMES = ("Ann", "Ben", "Tom", "Sam", "Mia", "Max", "Eva", "Leo")
KINDS = ("bloops", "razzies", "wugs", "daxes", "tomas", "lorps", "zibs", "quents")


def yes_no(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"


def _formula(rng: Random, values: dict[str, bool], depth: int) -> tuple[str, bool]:
    """A random formula over the letters, in words, and its value."""
    if depth == 0:
        letter = rng.choice(list(values))
        negated = rng.random() < 0.4
        return (f"not {letter}" if negated else letter), values[letter] != negated
    (left, a), (right, b) = (_formula(rng, values, depth - 1 if i == 0 else rng.randrange(depth)) for i in range(2))
    word = rng.choice(("and", "or"))
    value = (a and b) if word == "and" else (a or b)
    text = f"({left}) {word} ({right})"
    if rng.random() < 0.3:
        return f"not ({text})", not value
    return text, value


def truth(rng: Random, level: int) -> Problem:
    """The value of a formula; deeper with the level."""
    letters = "ABC"[: 2 if level <= 2 else 3]
    values = {letter: rng.random() < 0.5 for letter in letters}
    text, value = _formula(rng, values, (level + 1) // 2)
    given = ", ".join(f"{k} is {'true' if v else 'false'}" for k, v in values.items())
    return Problem(f"{given}. Is this true: {text}? Answer yes or no.", yes_no(value))


def inclusion(rng: Random, level: int) -> Problem:
    """Does a chain of "all X are Y" lead from one kind to another?"""
    kinds = rng.sample(KINDS, level + 2)
    premises = [f"All {a} are {b}." for a, b in itertools.pairwise(kinds)]
    follows = rng.random() < 0.5
    start, end = sorted(rng.sample(range(len(kinds)), 2))
    if not follows:
        start, end = end, start  # the converse does not follow
    rng.shuffle(premises)
    question = f"Does it follow that all {kinds[start]} are {kinds[end]}? Answer yes or no."
    return Problem(f"{' '.join(premises)} {question}", yes_no(follows))


def ranking(rng: Random, level: int) -> Problem:
    """Who is tallest, shortest or in between, from comparisons of neighbours in any order."""
    people = rng.sample(NAMES, min(level + 2, len(NAMES)))  # the first is the tallest
    clues = [
        f"{a} is taller than {b}." if rng.random() < 0.5 else f"{b} is shorter than {a}."
        for a, b in itertools.pairwise(people)
    ]
    rng.shuffle(clues)
    place = rng.choice(("tallest", "shortest") if level <= 2 else ("tallest", "shortest", "second tallest"))
    index = {"tallest": 0, "shortest": -1, "second tallest": 1}[place]
    return Problem(f"{' '.join(clues)} Who is the {place}?", people[index])


def _statements(rng: Random, people: list[str], who: int) -> tuple[str, Callable[[tuple[bool, ...]], bool]]:
    other = rng.choice([i for i in range(len(people)) if i != who])
    kind = rng.randrange(4)
    if kind == 0:
        return f"{people[other]} is a knight", lambda world: world[other]
    if kind == 1:
        return f"{people[other]} is a knave", lambda world: not world[other]
    if kind == 2:
        return f"{people[other]} and I are of the same kind", lambda world: world[who] == world[other]
    return f"at least one of {people[other]} and me is a knave", lambda world: not (world[who] and world[other])


def knights(rng: Random, level: int) -> Problem:
    """Knights always tell the truth, knaves always lie; the answer is forced (all worlds are tried)."""
    people = rng.sample(NAMES, 2 if level <= 2 else 3 if level <= 4 else 4)
    while True:
        said = [_statements(rng, people, who) for who in range(len(people))]
        worlds = [
            world
            for world in itertools.product((True, False), repeat=len(people))
            if all(claim(world) == world[i] for i, (_, claim) in enumerate(said))
        ]
        if len(worlds) == 1:
            break
    speech = " ".join(f'{people[i]} says: "{text}."' for i, (text, _) in enumerate(said))
    who = rng.randrange(len(people))
    question = f"Is {people[who]} a knight? Answer yes or no."
    return Problem(f"Knights always tell the truth and knaves always lie. {speech} {question}", yes_no(worlds[0][who]))
