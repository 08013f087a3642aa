"""What a generator gives."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Asked(NamedTuple):
    """A question and its exact answer."""

    prompt: str
    answer: str


Generator = Callable[[Random, int], Asked]


def yes_no(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"


def signed(value: int) -> str:
    """A term to append: `+3`, `-3`."""
    return f"+{value}" if value >= 0 else str(value)
