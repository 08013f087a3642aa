"""Questions from a local file or a hub dataset, with errors that name the file and the line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_pipeline.data.files import fields
from ray_pipeline.data.files.fields import BadRecord, Record
from ray_pipeline.data.forms.column_names import with_columns
from ray_pipeline.data.sources.sources import parse_source, source_records
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.tasks.item import Item


def read_items(task: str, given: str, convert: Callable[[Record, int], Item]) -> list[Item]:
    """Every record of a source as an item.

    Args:
        given: a file, or a hub name like org/name:split; ":question=problem" at its end names columns.
        convert: from a record and its index; raises BadRecord.
    Raises:
        UserError: no such source, an unreadable line, or a record without what is needed, by file and line.
    """
    items: list[Item] = []
    try:
        source = parse_source(given)
        if source.kind == "builtin":
            raise UserError('"builtin" is no file. Give a .jsonl or .parquet file, or a datasets name.')
        read = with_columns(lambda record: convert(record, len(items)), source.columns)
        for place, record in source_records(source):
            try:
                if isinstance(record, BadRecord):
                    raise record
                items.append(read(record))
            except BadRecord as error:
                raise UserError(f"{place}: {error}. Fix or remove it.") from None
    except UserError as error:
        raise UserError(f"--tasks {task}: {error}") from None
    return items


def text_field(record: Record, *names: str) -> str:
    """The first of these fields that is there, as text.

    Raises:
        BadRecord: none is there, or it is empty or no text.
    """
    name = next((name for name in names if name in record), None)
    if name is None:
        wanted = " or ".join(f'"{name}"' for name in names)
        raise BadRecord(f"needs a field {wanted}, but has {fields.names(record)}")
    return fields.filled(record, name)


def level(value: Any) -> int:
    """A difficulty from 1 to 5 as files write it (3, "3", "Level 3"); 0 for anything else."""
    digits = "".join(c for c in str(value) if c.isdecimal()) if isinstance(value, str | int) else ""
    return int(digits) if len(digits) == 1 and 1 <= int(digits) <= 5 else 0
