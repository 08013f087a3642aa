"""Fields of one record, read with errors that say what is wrong. The reader adds the file and the line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray_pipeline.errors import did_you_mean

Record = Mapping[str, Any]
# Of a value that is shown in an error.
_SHOWN = 80


class BadRecord(Exception):
    """A record that does not have what is needed; the reader adds the file and the line."""


def names(record: Record) -> str:
    """The record's fields, for an error."""
    return ", ".join(f'"{key}"' for key in record) or "no fields at all"


def shown(value: object) -> str:
    """A value, cut short, for an error."""
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def nearest_field(record: Record, known: Iterable[str]) -> str:
    """` (did you mean "messages"?)` for a field that almost has a known name, or an empty string."""
    known = list(known)
    hints = (did_you_mean(str(key), known) for key in record if key not in known)
    return next((hint for hint in hints if hint), "")


def text(record: Record, field: str) -> str:
    """A field that must be text.

    Raises:
        BadRecord: missing, or something else.
    """
    if field not in record:
        raise BadRecord(f'needs a field "{field}", but has {names(record)}')
    value = record[field]
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" must be text, but is {type(value).__name__}')
    return value


def filled(record: Record, field: str) -> str:
    """A field that must be text with something in it, or a number.

    Raises:
        BadRecord: missing, empty, or something else.
    """
    value = record.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # an answer may be written as a number
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" must be text, but is {type(value).__name__}')
    if not value.strip():
        raise BadRecord(f'field "{field}" is empty')
    return value


def optional_text(record: Record, field: str) -> str:
    """A field that may be missing, null or empty; the empty string then.

    Raises:
        BadRecord: something other than text.
    """
    return "" if record.get(field) is None else text(record, field)
