"""Fields of one record, read with errors that say what is wrong. The reader adds the file and the line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray_pipeline.errors import did_you_mean

Record = Mapping[str, Any]
# Of a value that is shown in an error.
_SHOWN = 80


class Watched(dict[str, Any]):
    """A record that remembers which of its fields were read, as do the records in it.

    A record in it of which no field was read by name was taken whole, as a call's arguments are.
    """

    def __init__(self, record: Record):
        super().__init__(record)
        self._read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        value = super().__getitem__(field)
        if type(value) is dict:
            self[field] = value = Watched(value)
        elif type(value) is list and any(type(entry) is dict for entry in value):
            self[field] = value = [Watched(entry) if type(entry) is dict else entry for entry in value]
        return value

    def get(self, field: str, default: Any = None) -> Any:
        """The field, or `default`; either way it was looked for."""
        try:
            return self[field]
        except KeyError:
            return default

    def items(self) -> Any:
        """All of it; counts as reading every field."""
        self._read.update(self)
        return super().items()

    def unread(self) -> set[str]:
        """Fields with something in them that were not read: "id", or "messages[].name" of the records in a list."""
        out: set[str] = set()
        for field, value in super().items():
            if field not in self._read:
                if value is not None and value not in ("", [], {}):
                    out.add(field)
            elif isinstance(value, Watched):
                out |= {f"{field}.{name}" for name in value._parts()}
            elif isinstance(value, list):
                out |= {f"{field}[].{name}" for entry in value if isinstance(entry, Watched) for name in entry._parts()}
        return out

    def _parts(self) -> set[str]:
        return self.unread() if self._read else set()


def glance(record: Record, field: str) -> Any:
    """A field's value, or None, without counting as read."""
    return dict.get(record, field) if isinstance(record, dict) else record.get(field)


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
