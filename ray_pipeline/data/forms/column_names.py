"""Columns under other names: `file.jsonl:prompt=question,response=answer` reads the column question as the prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ray_pipeline.data.files.fields import BadRecord, Record, Watched, names
from ray_pipeline.data.forms.chat_records import ASIDE, FORMS
from ray_pipeline.data.forms.preference_records import FORMS as PREFERENCE_FORMS
from ray_pipeline.data.forms.question_records import BEFORE, CHOICES, QUESTION, SYSTEM
from ray_pipeline.errors import UserError, did_you_mean

T = TypeVar("T")
Columns = tuple[tuple[str, str], ...]
"""Pairs of (the name it is read by, the column); a column inside another one is written `reward_model.ground_truth`."""

DOCUMENT = ("text",)
CONVERSATION = tuple(dict.fromkeys(name for form in FORMS for name in form.needs)) + ASIDE
ASKED = (*QUESTION, "answer", "solution", *BEFORE, *CHOICES, "category", "difficulty")
PREFERENCE = (*dict.fromkeys(name for form in PREFERENCE_FORMS for name in form), "input", *SYSTEM, "tools")


def parse_columns(given: str, text: str) -> Columns:
    """ "prompt=question,response=answer" -> (("prompt", "question"), ("response", "answer")).

    Args:
        given: the whole name of the source, for errors.
    Raises:
        UserError: a name is given twice.
    """
    parts = [part.partition("=") for part in text.split(",")]
    pairs = tuple((name.strip(), column.strip()) for name, _, column in parts)
    twice = next((name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1), None)
    if twice is not None:
        raise UserError(f'"{given}": "{twice}" stands for two columns. Keep one of them.')
    return pairs


def check_names(given: str, columns: Columns, known: Collection[str]) -> None:
    """Raise UserError for a name that nothing is read by."""
    for name, column in columns:
        if name not in known:
            raise UserError(
                f'"{given}": nothing is read as "{name}"{did_you_mean(name, known)}, so the column "{column}" would be '
                f"left out. Names are {', '.join(known)}."
            )


def with_columns(convert: Callable[[Record], T], columns: Columns) -> Callable[[Record], T]:
    """`convert` for records whose columns have other names; of such a record the named columns alone are read."""
    if not columns:
        return convert

    def mapped(record: Record) -> T:
        renamed = Watched({name: _value(record, name, column) for name, column in columns})
        value = convert(renamed)
        unused = [name for name, _ in columns if name in renamed.unread()]
        if unused:
            raise BadRecord(f'"{unused[0]}" has no place beside {names({n: 0 for n, _ in columns if n != unused[0]})}')
        return value

    return mapped


def _value(record: Record, name: str, column: str) -> Any:
    """The column, or what lies in it at the end of a path with dots."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            hint = did_you_mean(column, [str(key) for key in record])
            raise BadRecord(f'has no column "{column}" to read as "{name}"{hint}. Its columns are {names(record)}')
        value = value[part]
    return value
