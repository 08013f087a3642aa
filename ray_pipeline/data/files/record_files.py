"""Records of local .json, .jsonl, .csv, .tsv, .parquet, .arrow and .feather files, with the place of each.

A record that cannot be read is given as a BadRecord in its place, so that the reader may omit it; a file that
is damaged ends the reading.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.json_arrays import JsonError, NotAnArray, array_entries
from ray_pipeline.data.files.local_files import OnRead, check_file, read_utf8
from ray_pipeline.errors import UserError, first_line
from ray_pipeline.records.input_files import form

Placed = tuple[str, dict[str, Any] | BadRecord]
_ROWS = 1024  # of a table that are turned into records at once
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_records(path: Path, on_read: OnRead | None = None) -> Iterator[Placed]:
    """("file:line", record) of .jsonl, .csv and .tsv, ("file:row", record) of .parquet, .arrow, .feather and .json.

    Args:
        on_read: called as the file is read.
    Raises:
        UserError: a file that is damaged.
    """
    check_file(path)
    kind = form(path)
    if kind == ".parquet":
        yield from _read_parquet(path, on_read)
    elif kind in (".arrow", ".feather"):
        yield from _read_arrow(path, on_read)
    elif kind in _DELIMITERS:
        yield from _read_csv(path, _DELIMITERS[kind], on_read)
    elif kind == ".jsonl":
        yield from _read_jsonl(path, on_read)
    elif kind == ".json":
        yield from _read_json(path, on_read)
    else:
        raise UserError(f"{path}: plain text has no records. Give a .json, .jsonl, .csv or .parquet file.")


def _lines(path: Path, on_read: OnRead | None) -> Iterator[str]:
    """Lines without their ends; a line longer than many pieces is put together once."""
    held: list[str] = []
    for piece in read_utf8(path, on_read):
        first, *others = piece.split("\n")
        held.append(first)
        if others:
            yield "".join(held)
            yield from others[:-1]
            held = [others[-1]]
    last = "".join(held)
    if last:
        yield last


def _read_jsonl(path: Path, on_read: OnRead | None) -> Iterator[Placed]:
    for number, line in enumerate(_lines(path, on_read), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", BadRecord(f"not valid JSON ({error}). Every line must be one JSON object")
            continue
        yield f"{path}:{number}", _checked_object(record, escapes="\\ud" in line or "\\uD" in line)


def _read_json(path: Path, on_read: OnRead | None) -> Iterator[Placed]:
    """Entries of the array that is the file's whole content."""
    try:
        for number, entry in enumerate(array_entries(read_utf8(path, on_read))):
            yield f"{path}[{number}]", _checked_object(entry.value, escapes=entry.escapes)
    except NotAnArray as error:
        found = f'begins with "{error.reason}"' if error.reason else "holds nothing"
        raise UserError(
            f"{path}: must hold an array of objects, but {found}. Put the objects in [ ]; with one object per line the "
            "file is called .jsonl."
        ) from None
    except JsonError as error:
        raise UserError(
            f"{path}:{error.line}: not valid JSON ({error.reason}). A .json file holds one array of objects; with one "
            "object per line it is called .jsonl."
        ) from None


def _checked_object(record: Any, *, escapes: bool) -> dict[str, Any] | BadRecord:
    """The record, if it is an object and all of it is text that can be written as UTF-8."""
    if not isinstance(record, dict):
        return BadRecord(f"must be a JSON object, but is a {type(record).__name__}")
    if not escapes:  # only escapes spell surrogates
        return record
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return BadRecord(f"holds half a character ({half!a}), which is no text")
    return record


def _read_csv(path: Path, delimiter: str, on_read: OnRead | None) -> Iterator[Placed]:
    """Rows under the names of the first one; every value is text."""
    # The standard limit of 128 KB a field is process-wide; a document may be longer.
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((f"{line}\n" for line in _lines(path, on_read)), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        _check_header(path, names, delimiter)
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if len(row) == len(names):
                yield place, dict(zip(names, row, strict=True))
            elif row:
                yield place, BadRecord(f"has {len(row)} fields, but the first line names {len(names)}")
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not valid CSV ({error}). Fix it, or save it as .jsonl.") from None


def _check_header(path: Path, names: list[str], delimiter: str) -> None:
    """Raise UserError unless the first line names every column, and each differently."""
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f'{path}: its columns are parted by ";". Save it with "{delimiter}" between them.')
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{path}: its first line must name each column, and differently, but is {names}. Fix it.")


def _read_parquet(path: Path, on_read: OnRead | None) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _rows(path, file.iter_batches(batch_size=_ROWS), file.metadata.num_rows, on_read)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)}). Write it again.") from None


def _read_arrow(path: Path, on_read: OnRead | None) -> Iterator[Placed]:
    """Arrow's file format, which Feather is, or its stream format, which `datasets` writes."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            parts = (batch.slice(at, _ROWS) for batch in batches for at in range(0, len(batch), _ROWS))
            yield from _rows(path, parts, None, on_read)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Arrow file ({first_line(error)}). Write it again.") from None


def _rows(path: Path, batches: Iterable[Any], total: int | None, on_read: OnRead | None) -> Iterator[Placed]:
    """The records of tables; `total` rows are in all of them, None where that is not known."""
    number, size = 0, path.stat().st_size
    for batch in batches:
        if on_read is not None:
            on_read(path, size * min(total, number + len(batch)) // max(1, total) if total is not None else 0)
        for record in table_records(batch):
            number += 1
            yield f"{path}:row {number}", record
    if on_read is not None:
        on_read(path, size)


def table_records(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or record batch, values that Python has no form for as OutOfRange."""
    columns = [_values(column) for column in table.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(table.schema.names, row, strict=True))


class OutOfRange:
    """A value that Python has no form for, as a date beyond the year 9999; of no use unless its column is read."""


def _values(column: Any) -> list[Any]:
    import pyarrow

    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return OutOfRange()
