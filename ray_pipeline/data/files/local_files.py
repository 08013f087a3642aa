"""Local files as text in pieces, with errors that name the byte; what they hold is for `record_files` and `text_files`.
Files of text may be compressed as .gz or .zst."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ray_pipeline.errors import UserError, did_you_mean, first_line
from ray_pipeline.records.input_files import COMPRESSED, SUFFIXES, form, is_data, stamp_of

CHECKED_RECORDS = 20_000
_CHUNK = 1 << 22
_HEAD = 64  # bytes that tell a file's kind; even, for UTF-16
# Forms that are text.
TEXT = (".txt", ".json", ".jsonl", ".csv", ".tsv")
OnRead = Callable[[Path, int], None]
"""Called with a file and how many of its bytes, as they lie on disk, have been read."""


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
        raise UserError(f"{path}: {form(path)} is compressed inside, so it is read unpacked alone. Unpack the file.")
    try:
        with path.open("rb") as handle:
            head = handle.read(_HEAD)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from None
    if not head:
        raise UserError(f"{path}: the file is empty. Give a file with text in it.")
    if form(path) in TEXT and path.suffix not in COMPRESSED:
        _check_is_text(path, head)


def _check_is_text(path: Path, head: bytes) -> None:
    """Raise UserError where a file's beginning shows it to be of another kind than its name says."""
    for magic, (kind, way_out) in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {kind}, not plain text. {way_out.format(name=path.name)}.")
    zeros = [bool(head[start::2].strip(b"\0")) for start in (0, 1)]
    if len(head) >= 4 and not all(zeros) and any(zeros):  # every other byte of Latin letters in UTF-16
        order = "le" if zeros[0] else "be"
        raise UserError(f"{path}: is UTF-16, not UTF-8. {_recoded(f'utf-16{order}', '{name}').format(name=path.name)}.")


def _recoded(encoding: str, name: str) -> str:
    return f"Save the file as UTF-8: iconv -f {encoding} -t utf-8 {name} > utf8-{name}"


# What a file begins with -> what it is, and what to do.
_MAGIC = {
    b"\x1f\x8b": ("compressed by gzip", "Call it {name}.gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Call it {name}.zst"),
    b"BZh91AY&SY": ("compressed by bzip2", "Unpack it with bunzip2"),
    b"\xfd7zXZ": ("compressed by xz", "Unpack it with unxz"),
    b"PK\x03\x04": ("a zip archive", "Unpack it with unzip"),
    b"PAR1": ("a parquet file", "Let its name end in .parquet"),
    b"ARROW1": ("an Arrow file", "Let its name end in .arrow"),
    b"\xff\xfe\0\0": ("UTF-32, not UTF-8", _recoded("utf-32", "{name}")),
    b"\xff\xfe": ("UTF-16, not UTF-8", _recoded("utf-16", "{name}")),
    b"\xfe\xff": ("UTF-16, not UTF-8", _recoded("utf-16", "{name}")),
}


def _not_utf8(path: Path, offset: int, byte: int) -> UserError:
    return UserError(
        f"{path}: byte {offset} (0x{byte:02x}) is not UTF-8. If it is Western European text: "
        f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}. If it is no text at all, give another file."
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
            raise UserError(f"{path}: not a whole {path.suffix} file ({first_line(error)}). Write it again.") from None


def read_utf8(path: Path, on_read: OnRead | None = None) -> Iterator[str]:
    """The text in pieces, line ends as "\\n"; a byte order mark is skipped.

    Args:
        on_read: called before a piece is given.
    Raises:
        UserError: with the offset of the first byte that is not UTF-8, or of a compressed file that is not whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    carry = ""
    with open_bytes(path) as (handle, raw):
        while True:
            chunk = handle.read(_CHUNK)
            if on_read is not None:
                on_read(path, raw.tell())
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
