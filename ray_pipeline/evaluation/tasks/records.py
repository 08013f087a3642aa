"""Questions from a local file or a hub dataset, with errors that name the file and the line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.data import hub, local_files
from ray_pipeline.data.records import BadRecord
from ray_pipeline.data.sources import parse_source
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.tasks.item import Item

Record = Mapping[str, Any]


def read_items(task: str, given: str, convert: Callable[[Record, int], Item]) -> list[Item]:
    """Every record of a source as an item.

    Args:
        given: a file, or a hub name like org/name:split. convert: from a record and its index; raises BadRecord.
    Raises:
        UserError: no such source, an unreadable line, or a record without what is needed, by file and line.
    """
    items = []
    try:
        for index, (place, record) in enumerate(_records(given)):
            try:
                items.append(convert(record, index))
            except BadRecord as error:
                raise UserError(f"{place}: {error}. Mend or remove it.") from None
    except UserError as error:
        raise UserError(f"--tasks {task}: {error}") from None
    return items


def _records(given: str) -> Iterator[tuple[str, Record]]:
    source = parse_source(given)
    if source.kind == "builtin":
        raise UserError('"builtin" is no file. Give a .jsonl or .parquet file, or a datasets name.')
    if source.kind == "file":
        return local_files.read_records(Path(source.location))
    return hub.stream_records(source.location, source.split)


def text_field(record: Record, *names: str) -> str:
    """The first of these fields that is there, as text.

    Raises:
        BadRecord: none is there, or it is no text.
    """
    for name in names:
        if name in record:
            value = record[name]
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value.strip():
                raise BadRecord(f'field "{name}" must be text, but is {value!r:.60}')
            return value
    wanted = " or ".join(f'"{name}"' for name in names)
    raise BadRecord(f"needs a field {wanted}, but has {', '.join(map(repr, record)) or 'none'}")


def level(value: Any) -> int:
    """A difficulty from 1 to 5 as files write it (3, "3", "Level 3"); 0 for anything else."""
    digits = "".join(c for c in str(value) if c.isdecimal()) if isinstance(value, str | int) else ""
    return int(digits) if len(digits) == 1 and 1 <= int(digits) <= 5 else 0
