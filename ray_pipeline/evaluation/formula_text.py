"""Questions and answers around formulas: what is asked, and what was answered. Guesses nothing: a word that may change
the meaning is refused by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import sympy

from ray_pipeline.evaluation.formula import FUNCTIONS, NotUnderstood, plain, read_formula, symbol

# Words that change nothing of what a formula means.
_FILLER = frozenset(
    "what is the value of solve find for if compute calculate evaluate simplify please equation equations and "
    "expression so then therefore thus hence answer answers are result we get have work out with given that where "
    "solution solutions or unknown real number final which".split()
)
_NOTHING = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|none|empty set|∅|\\emptyset|\{\}")
_ALL = re.compile(
    r"(?:all|any|every)(?: real)?(?: numbers?| values?)?(?: of x)?|infinitely many(?: solutions)?|identity"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_DECIMAL = re.compile(r"[-+]?\d*\.(\d+)")


@dataclass(frozen=True)
class Problem:
    """What is asked.

    Attributes:
        equations: as (left, right). expression: where there are none. unknown: the letter it is solved for, if named.
        denominators: what is divided by, which no solution may make zero.
    """

    equations: tuple[tuple[sympy.Expr, sympy.Expr], ...] = ()
    expression: sympy.Expr | None = None
    unknown: sympy.Symbol | None = None
    denominators: tuple[sympy.Expr, ...] = ()


@dataclass(frozen=True)
class Stated:
    """What was answered.

    Attributes:
        values: without a name before them. named: by unknown. decimals: of those values that are written with a point.
        kind: "values", "nothing" (there is no solution) or "all" (every number is one).
    """

    kind: str = "values"
    values: tuple[sympy.Expr, ...] = ()
    named: dict[str, tuple[sympy.Expr, ...]] = field(default_factory=dict)
    decimals: dict[sympy.Expr, int] = field(default_factory=dict)


def is_bare(text: str) -> bool:
    """Whether a question is a formula without words."""
    return all(word.lower() in (*FUNCTIONS, "pi") for word in _WORD.findall(text))


def read_problem(text: str) -> Problem:
    """What a question asks.

    Raises:
        NotUnderstood: words that are not known, inequalities, or no formula at all.
    """
    equations, others, letters = [], [], []
    below: list[sympy.Expr] = []
    for part in _parts(text):
        if "=" in part:
            sides = part.split("=")
            if len(sides) != 2:
                raise NotUnderstood(f'"{part}" has {len(sides) - 1} signs of equality')
            equations.append((read_formula(sides[0], below), read_formula(sides[1], below)))
        elif len(part) == 1 and part.isalpha():
            letters.append(part)
        else:
            others.append(part)
    unknown = symbol(letters[-1]) if letters else None
    if equations and not others:
        return Problem(tuple(equations), None, unknown, tuple(below))
    if len(others) == 1 and not equations:
        return Problem((), read_formula(others[0]), None)
    if not equations and not others:
        raise NotUnderstood("there is no formula in the question")
    raise NotUnderstood(f"the question holds {len(equations)} equations and {len(others)} other formulas")


def read_answer(text: str) -> Stated:
    """What an answer states.

    Raises:
        NotUnderstood: words that are not known, or no formula.
    """
    words = text.strip().strip(".").casefold()
    if _NOTHING.fullmatch(words):
        return Stated("nothing")
    if _ALL.fullmatch(words):
        return Stated("all")
    values: list[sympy.Expr] = []
    named: dict[str, tuple[sympy.Expr, ...]] = {}
    decimals: dict[sympy.Expr, int] = {}
    name = None
    for part in _parts(text.replace("{", " ").replace("}", " ") if "\\" not in text else text):
        if len(part) == 1 and part.isalpha():  # "x is 5"
            name = part
            continue
        *left, right = (side.strip() for side in part.split("="))
        if left:
            if len(left[0]) != 1 or not left[0].isalpha():
                left = []  # "12+30=42": the last side is the answer
            name = left[0] if left else name
        for side in (right.replace("±", "+"), right.replace("±", "-")) if "±" in right else (right,):
            value = read_formula(side)
            if point := _DECIMAL.fullmatch(plain(side).strip()):
                decimals[value] = len(point[1])
            if name:
                named[name] = (*named.get(name, ()), value)
            else:
                values.append(value)
    if not values and not named:
        raise NotUnderstood("there is no formula in the answer" if text.strip() else "the answer is empty")
    return Stated("values", tuple(values), named, decimals)


def _parts(text: str) -> list[str]:
    """The formulas between words and punctuation.

    Raises:
        NotUnderstood: another word, or an inequality.
    """
    text = plain(text)
    if found := re.search(r"[<>≤≥≠]|\\(?:leq?|geq?|neq?)\b", text):
        raise NotUnderstood(f'inequalities ("{found[0]}") are not checked')
    for word in _WORD.findall(text):
        if word.lower() not in _FILLER and word.lower() not in FUNCTIONS and word.lower() != "pi":
            raise NotUnderstood(f'the word "{word}"')
    text = _WORD.sub(lambda word: ";" if word[0].lower() in _FILLER else word[0], text)
    # "3,5" and "6:3" may mean several things, "5!" is no end of a sentence: none of these is cut.
    parts = re.split(r"[;?\n]|[,:](?=\s|$|[A-Za-z])|\.(?!\d)", text)
    return [part.strip() for part in parts if part.strip()]
