"""Values of a stranger's config.json: of the type that is expected, or refused by name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a whole number of more than 4300 digits
        return "(too long to show)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def object_of(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A group of keys, empty where it is absent or null.

    Raises:
        ValueError: something else.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {key}={short(value)}: must be an object")
    return value or {}


def list_of_text(values: Mapping[str, Any], key: str) -> list[str]:
    """A list of names, empty where it is absent or null.

    Raises:
        ValueError: something else.
    """
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"config.json: {key}={short(value)}: must be a list of names")
    return value


def number(key: str, value: Any) -> float:
    """A number, whole or not.

    Raises:
        ValueError: something else, a true or false too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {key}={short(value)}: must be a number")
    return value
