"""Local .txt, .json, .jsonl and .parquet files, read in pieces, with errors that name the line or the byte. All but
parquet may be compressed as .gz or .zst."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.input_files import COMPRESSED, SUFFIXES, form, is_data, stamp_of

CHECKED_RECORDS = 20_000
_CHUNK = 1 << 22
Told = Callable[[Path, int], None]
"""Told of a file how many of its bytes, as they lie on disk, have been read."""


def check_file(path: Path) -> None:
    """Raise UserError unless the file is there, can be read, is not empty and has a known form."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give one {', '.join(SUFFIXES)} file.")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
        hint = did_you_mean(path.name, siblings)
        raise UserError(f"{path}: no such file{where}{hint}. Give the path of an existing file.")
    stamp_of(path)  # a pipe would keep whoever opens it waiting
    if form(path) not in SUFFIXES:
        raise UserError(f'{path}: files end in {", ".join(SUFFIXES)}, not "{form(path)}".')
    if not is_data(path):
        raise UserError(f"{path}: parquet is compressed inside, so it is read as .parquet alone. Unpack the file.")
    try:
        with path.open("rb") as handle:
            first = handle.read(1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if not first:
        raise UserError(f"{path}: the file is empty. Give a file with text in it.")


def _not_utf8(path: Path, offset: int, byte: int) -> UserError:
    return UserError(
        f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8. Save the file as UTF-8: "
        f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
    )


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the file's bytes, unpacked; the file as it lies on disk, whose `tell` says how far it is read).

    Raises:
        UserError: a compressed file that is not whole.
    """
    with path.open("rb") as raw:
        if path.suffix not in COMPRESSED:
            yield raw, raw
            return
        import pyarrow

        try:
            with pyarrow.CompressedInputStream(raw, {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as unpacked:
                yield unpacked, raw
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a whole {path.suffix} file ({reason}). Write it again.") from None


def read_utf8(path: Path, told: Told | None = None) -> Iterator[str]:
    """The text in pieces, line ends as "\\n"; a byte order mark is skipped.

    Args:
        told: told of the bytes read before a piece is given.
    Raises:
        UserError: with the offset of the first byte that is not UTF-8, or of a compressed file that is not whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    carry = ""
    with open_bytes(path) as (handle, raw):
        while True:
            chunk = handle.read(_CHUNK)
            if told is not None:
                told(path, raw.tell())
            pending = len(decoder.getstate()[0])  # bytes of a character cut by the chunk border
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = consumed - pending + error.start
                raise _not_utf8(path, offset, error.object[error.start]) from None
            if consumed == 0:
                text = text.removeprefix("\ufeff")
            consumed += len(chunk)
            text = carry + text
            carry = "\r" if text.endswith("\r") and chunk else ""  # "\r\n" may be cut in two
            yield text.removesuffix(carry).replace("\r\n", "\n").replace("\r", "\n")
            if not chunk:
                return


def check_utf8(path: Path) -> None:
    """Raise UserError unless the whole file is UTF-8 with something other than white space in it."""
    pieces = [bool(piece.strip()) for piece in read_utf8(path)]  # all of them: the fault may be in the last byte
    if not any(pieces):
        raise UserError(f"{path}: holds only white space. Give a file with text in it.")


def read_records(path: Path, told: Told | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of a .jsonl file, ("file:row", record) of a .parquet file or an array in a .json file.

    Args:
        told: told how far the file is read.
    Raises:
        UserError: a line or an entry that is not a JSON object, naming it, or a file that is damaged.
    """
    check_file(path)
    if form(path) == ".parquet":
        yield from _read_parquet(path, told)
    elif form(path) == ".jsonl":
        yield from _read_jsonl(path, told)
    elif form(path) == ".json":
        yield from _read_json(path, told)
    else:
        raise UserError(f"{path}: plain text has no records. Give a .json, .jsonl or .parquet file.")


def _lines(path: Path, told: Told | None) -> Iterator[str]:
    rest = ""
    for piece in read_utf8(path, told):
        lines = (rest + piece).split("\n")
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def _read_jsonl(path: Path, told: Told | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path, told), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON ({error}). Every line must be one JSON object.") from None
        yield place, _checked_object(record, place, line)


def _read_json(path: Path, told: Told | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries of the array that is the file's whole content."""
    text = "".join(read_utf8(path, told))
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). A .json file holds one array of objects; with one "
            "object per line it is called .jsonl."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Mend it.") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: must hold an array of objects, but holds a {type(entries).__name__}. Put it in [ ].")
    for number, entry in enumerate(entries):
        place = f"{path}[{number}]"
        yield place, _checked_object(entry, place, text)


def _checked_object(record: Any, place: str, source: str) -> dict[str, Any]:
    """The record parsed from `source`, if it is an object and all of it is text that can be written as UTF-8."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: must be a JSON object, but is a {type(record).__name__}. Mend or remove it.")
    if "\\ud" not in source and "\\uD" not in source:  # only escapes spell surrogates
        return record
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{place}: holds half a character ({half!a}), which is no text. Mend or remove it.") from None
    return record


def _read_parquet(path: Path, told: Told | None) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        file = pyarrow.parquet.ParquetFile(path)
        rows, size = max(1, file.metadata.num_rows), path.stat().st_size
        for batch in file.iter_batches(batch_size=1024):
            if told is not None:
                told(path, size * min(rows, number + len(batch)) // rows)
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}). Write it again.") from None
