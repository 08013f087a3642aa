"""Functions that tests use as tools."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from torch import Tensor


def add(a: int, b: float = 1.5, *, unit: Literal["m", "km"] = "m", tags: list[str] | None = None) -> dict[str, Any]:
    """Adds two numbers,
    and names the unit.

    More about it.

    Args:
        a: the first number.
        b (float): the second one.
        unit: of the sum.

    Returns:
        c: the sum.
    """
    return {"sum": a + b, "unit": unit, "tags": tags}


def greet(name: str) -> str:
    """Greets somebody."""
    return f"Hello, {name}!"


def hang(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "done"


def raises(text: str) -> str:
    """Raises."""
    raise ValueError(text)


def dies(code: int) -> str:
    """Ends its process."""
    os._exit(code)


def talks(words: int) -> str:
    """Says a lot."""
    return "word " * words


def undocumented(a: int) -> int:
    return a


def unannotated(a):
    """Says nothing of a's type."""
    return a


def strange(a: object) -> str:
    """Takes anything."""
    return str(a)


def many(*a: int) -> str:
    """Takes many."""
    return str(a)


def pictures(image: Tensor) -> str:
    """Takes what JSON cannot write."""
    return str(image)
