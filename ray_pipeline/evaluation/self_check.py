"""Does an answer's own working hold? Finds arithmetic statements in it and computes them again. Never raises.

What is detected, and nothing more: chains like `16-3-4 = 9` or `x = 35-5 = 30` between numbers, with + - * / ^ and
brackets, at least one operation on the left. A statement is right if it holds exactly, or after rounding where its
right side is a decimal number. Statements with an unknown (`3x+5=20`) claim nothing about numbers and are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from ray_pipeline.reasoning import parse
from ray_pipeline.rewards.answer import MAX_NUMBER_LENGTH, extract, final_text, stated_number
from ray_pipeline.tools import calculator
from ray_pipeline.tools.tool import ToolError

MAX_TOKENS = 200  # of one expression; more is babble
MAX_EXPONENT = 64
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-"})
_THOUSANDS = re.compile(r"(?<![0-9])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])")
# One character at a time: a pattern with more than one way to read a text would take exponential time on babble.
_RUN = re.compile(r"(?:[-+*/^()=0-9$€£ \t]|\.(?=[0-9]))+")
_LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[-+*/^()]")
# Two operands with nothing but space between them: a new statement begins.
_BORDER = re.compile(r"(?<=[0-9)])[ \t]+(?=[0-9(])")
# Behind a number: a letter of its own (6x), a power, or more digits.
_UNKNOWN = re.compile(r"[A-Za-z](?![A-Za-z])|\^|\.[0-9]")
_REFLECTION = re.compile(
    r"\b(?:wait|hmm|actually|on second thought|alternatively|let me (?:re-?)?(?:check|verify|reconsider|compute)|"
    r"let's (?:re-?)?(?:check|verify)|double[- ]check|re-?check|verify|to check|i made a mistake|that's wrong)\b|"
    r"\bcheck:",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SelfCheck:
    """What an answer's working shows.

    Attributes:
        steps, right: arithmetic statements found, and how many of them hold.
        recomputes: the final result is a number that one of the right statements gives.
        reflects: a phrase of doubt or checking ("wait", "let me check", "double-check", ...) is there.
    """

    steps: int
    right: int
    recomputes: bool
    reflects: bool


def self_check(completion: str) -> SelfCheck:
    """Look at the thinking, or at the whole answer where nothing was thought."""
    working = parse(completion).thinking or completion
    found = list(_statements(working.translate(_SIGNS)))
    right = [value for value, holds in found if holds]
    final = stated_number(extract(final_text(completion) or ""))
    return SelfCheck(len(found), len(right), final in right, bool(_REFLECTION.search(working)))


def _statements(text: str) -> Iterator[tuple[Fraction, bool]]:
    """(value of the right side, whether the statement holds) for each arithmetic statement."""
    text = _THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    for run in (found for found in _RUN.finditer(text) if "=" in found[0]):
        before, first = text[: run.start()].rstrip()[-1:], run[0].lstrip()[:1]
        unknown_before = before.isalnum() and first in "+-*/^"
        unknown_after = not run[0][-1].isspace() and _UNKNOWN.match(text, run.end()) is not None
        for statement in _pieces(run[0], drop_first=unknown_before, drop_last=unknown_after):
            yield from _links(statement)


def _pieces(run: str, *, drop_first: bool, drop_last: bool) -> list[list[str]]:
    """Statements of a run as their sides; a side that belongs to a term with an unknown is emptied."""
    statements = [part.split("=") for part in _BORDER.split(re.sub(r"[$€£]", "", run))]
    if drop_first:
        statements[0][0] = ""
    if drop_last:
        statements[-1][-1] = ""
    return statements


def _links(sides: list[str]) -> Iterator[tuple[Fraction, bool]]:
    for left, right in itertools.pairwise(sides):
        a, b = evaluate(left), evaluate(right)
        operates = len(_TOKEN.findall(left.strip().lstrip("-"))) > 1
        if a is not None and b is not None and operates:
            decimals = len(right.strip().partition(".")[2])
            off = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
            yield b, abs(a - b) <= off


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an arithmetic expression; None where it is none, or divides by zero.

    Precedence and brackets as in school; `^` binds to the right and before the sign.
    """
    if _TOKEN.sub("", expression).strip() or len(expression) > 4 * MAX_NUMBER_LENGTH:
        return None
    tokens = _TOKEN.findall(expression)
    if len(tokens) > MAX_TOKENS or any(len(token) > MAX_NUMBER_LENGTH for token in tokens):
        return None
    if any(a == b and a in "*/" for a, b in itertools.pairwise(tokens)):  # Python's // and ** are no school's
        return None
    if any(a == "^" and b[0].isdigit() and float(b) > MAX_EXPONENT for a, b in itertools.pairwise(tokens)):
        return None
    try:
        return calculator.evaluate(_LEADING_ZEROS.sub("", expression))
    except ToolError:
        return None
