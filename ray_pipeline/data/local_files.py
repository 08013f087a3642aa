"""Local .txt, .json, .jsonl and .parquet files, read in pieces, with errors that name the line or the byte."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, did_you_mean

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
# Paragraphs of a text are merged up to this many characters, which is several packed rows of small models.
DOCUMENT_CHARACTERS = 2000
CHECKED_RECORDS = 20_000
_CHUNK = 1 << 22
_BLANK = re.compile(r"\n[ \t]*\n")


def check_file(path: Path) -> None:
    """Raise UserError unless the file is there, can be read, is not empty and has a known form."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give one {', '.join(SUFFIXES)} file.")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
        hint = did_you_mean(path.name, siblings)
        raise UserError(f"{path}: no such file{where}{hint}. Give the path of an existing file.")
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path}: files end in {", ".join(SUFFIXES)}, not "{path.suffix}".')
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


def read_utf8(path: Path) -> Iterator[str]:
    """The text in pieces, line ends as "\\n"; a byte order mark is skipped.

    Raises:
        UserError: with the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    carry = ""
    with path.open("rb") as handle:
        while True:
            chunk = handle.read(_CHUNK)
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


def read_text_documents(path: Path) -> Iterator[str]:
    """Documents of a plain text: paragraphs merged up to DOCUMENT_CHARACTERS, long ones cut at a line end or space."""
    check_file(path)
    rest = ""
    for piece in read_utf8(path):
        paragraphs = _BLANK.split(rest + piece)
        rest = paragraphs.pop()  # may go on in the next piece
        held: list[str] = []
        size = 0
        for paragraph in paragraphs:
            if held and size + len(paragraph) > DOCUMENT_CHARACTERS:
                yield from _cut("\n\n".join(held))
                held, size = [], 0
            held.append(paragraph)
            size += len(paragraph) + 2
        rest = "\n\n".join([*held, rest])
        while len(rest) > _CHUNK:  # a text without blank lines must not pile up
            head, rest = rest[:_CHUNK], rest[_CHUNK:]
            yield from _cut(head)
    yield from _cut(rest)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most twice DOCUMENT_CHARACTERS with something in them."""
    while len(text) > 2 * DOCUMENT_CHARACTERS:
        at = max(text.rfind("\n", 1, DOCUMENT_CHARACTERS), 0) or max(text.rfind(" ", 1, DOCUMENT_CHARACTERS), 0)
        at = at or DOCUMENT_CHARACTERS
        if text[:at].strip():
            yield text[:at]
        text = text[at:]
    if text.strip():
        yield text


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of a .jsonl file, ("file:row", record) of a .parquet file or an array in a .json file.

    Raises:
        UserError: a line or an entry that is not a JSON object, naming it, or a file that is damaged.
    """
    check_file(path)
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    else:
        raise UserError(f"{path}: plain text has no records. Give a .json, .jsonl or .parquet file.")


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for piece in read_utf8(path):
        lines = (rest + piece).split("\n")
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON ({error}). Every line must be one JSON object.") from None
        yield place, _checked_object(record, place, line)


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Entries of the array that is the file's whole content."""
    text = "".join(read_utf8(path))
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


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}). Write it again.") from None
