"""Documents of plain text files: what ends one, and how long one may get. Pieces of text in, documents out, in one
pass whose memory and time per character do not grow with the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_pipeline.data.files.local_files import OnRead, check_file, read_utf8
from ray_pipeline.settings.schema import DataConfig

# A document that is longer is cut, so that no process has to hold a file as one piece: 16M characters.
LONGEST = 1 << 24
# Text without blank lines is cut when this much of it waits, in characters.
_WAITING = 1 << 22
_BLANK = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True)
class TextRule:
    """What is a document of a .txt file; `data.text_*` in the settings.

    Attributes:
        documents: "file": all of the file, or of what stands between separators. "paragraphs": paragraphs merged up to
            `characters`. "lines": a line each. "auto": "file" where the separator occurs, else "paragraphs".
        separator: ends a document wherever it stands, and belongs to none; None: nothing does.
        characters: a merged document ends before it gets longer; a single paragraph may have twice as many.
    """

    documents: Literal["auto", "file", "paragraphs", "lines"] = "auto"
    separator: str | None = "<|endoftext|>"
    characters: int = 2000

    @classmethod
    def of(cls, data: DataConfig) -> TextRule:
        """The rule of the settings. By default a document fills a row, at about four characters a token."""
        return cls(data.text_documents, data.text_separator, data.text_characters or max(2000, 4 * data.seq_len))


def read_text_documents(path: Path, rule: TextRule, on_read: OnRead | None = None) -> Iterator[str]:
    """Documents of a .txt file, in order; those without any letters are left out.

    Args:
        on_read: as for `read_utf8`.
    """
    check_file(path)
    kind = rule.documents
    if kind == "auto":
        kind = "file" if rule.separator is not None and _occurs(rule.separator, read_utf8(path)) else "paragraphs"
    held = ""
    for piece, ends in _separated(read_utf8(path, on_read), rule.separator):
        held += piece
        if kind == "paragraphs":
            documents, held = _merged(held, rule.characters)
        elif kind == "lines":
            *documents, held = held.split("\n")
        else:
            documents = []
        yield from _with_text(documents)
        if len(held) > LONGEST:
            *documents, held = _cut(held, LONGEST // 2)
            yield from _with_text(documents)
        if ends:
            yield from _with_text(_cut(held, rule.characters if kind == "paragraphs" else LONGEST))
            held = ""


def _with_text(documents: Iterable[str]) -> Iterator[str]:
    return (document for document in documents if document.strip())


def _occurs(separator: str, pieces: Iterable[str]) -> bool:
    end = ""
    for piece in pieces:
        if separator in end + piece:
            return True
        end = (end + piece)[-len(separator) :]
    return False


def _separated(pieces: Iterable[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    """The text in pieces without the separators; True with a piece at whose end a document ends."""
    rest = ""
    for piece in pieces:
        if separator is None:
            yield piece, False
            continue
        *whole, rest = (rest + piece).split(separator)
        yield from ((text, True) for text in whole)
        sure = max(0, len(rest) - len(separator) + 1)  # a separator may have begun behind it
        yield rest[:sure], False
        rest = rest[sure:]
    yield rest, True


def _merged(text: str, characters: int) -> tuple[list[str], str]:
    """Documents of whole paragraphs, and the text that may go on."""
    *paragraphs, last = _BLANK.split(text)
    documents: list[str] = []
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if held and size + len(paragraph) > characters:
            documents += _cut("\n\n".join(held), characters)
            held, size = [], 0
        held.append(paragraph)
        size += len(paragraph) + 2
    rest = "\n\n".join([*held, last])
    if len(rest) > _WAITING:
        *pieces, rest = _cut(rest, characters)
        documents += pieces
    return documents, rest


def _cut(text: str, characters: int) -> Iterator[str]:
    """Pieces of at most twice as many characters, cut at a line end or else a space where there is one."""
    start = 0
    while len(text) - start > 2 * characters:
        stop = start + characters
        at = max(text.rfind("\n", start + 1, stop), 0) or max(text.rfind(" ", start + 1, stop), 0) or stop
        yield text[start:at]
        start = at
    yield text[start:]
