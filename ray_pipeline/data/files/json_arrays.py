"""A JSON array read entry by entry from pieces of text, in linear time and the memory of a piece or an entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_SPACE = re.compile(r"[ \t\n\r]*")
# The longest thing that may be cut in two and then be called an error at its beginning: "-Infinity", "\ud83d\ude00".
_LONGEST_TOKEN = 16


class Entry(NamedTuple):
    """An entry of the array. `escapes`: whether it may spell surrogates, which are no text when they stand alone."""

    value: Any
    escapes: bool


class JsonError(Exception):
    """The text is no array. Attributes: line: from 1. reason: what `json` says."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line, self.reason = line, reason


class NotAnArray(JsonError):
    """The text begins with something else; `reason` is its first character."""


def array_entries(pieces: Iterator[str]) -> Iterator[Entry]:
    """The entries, as soon as each is read.

    Raises:
        JsonError: where the text stops being an array of JSON values.
    """
    window = _Window(pieces)
    first = window.peek()
    if first != "[":
        raise NotAnArray(window.line(), first)
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        yield window.entry()
        while window.take(",]") == ",":
            yield window.entry()
    if window.peek():
        raise JsonError(window.line(), "Extra data")


class _Window:
    """The part of the text that is being read: it grows at its end and forgets what was read.

    Attributes: text: what is held. at: how far it was read.
    """

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._decoder = pieces, json.JSONDecoder()
        self.text, self.at, self._lines = "", 0, 1

    def line(self, at: int | None = None) -> int:
        """Of the position `at` in `text`, or of where it was read to."""
        return self._lines + self.text.count("\n", 0, self.at if at is None else at)

    def more(self) -> bool:
        """Hold at least twice as much as is unread, so that reading an entry again costs no more than it did.

        Returns:
            False, and nothing is changed, at the end of the text.
        """
        rest = self.text[self.at :]
        held, wanted = [rest], max(1, len(rest))
        while wanted > 0 and (piece := next(self._pieces, None)) is not None:
            held.append(piece)
            wanted -= len(piece)
        grown = "".join(held)
        if len(grown) == len(rest):
            return False
        self._lines = self.line()
        self.text, self.at = grown, 0
        return True

    def peek(self) -> str:
        """The next character that is no space; the empty string at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it matches nothing as well
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            raise JsonError(self.line(), "Expecting ',' delimiter")
        self.at += 1
        return found

    def entry(self) -> Entry:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                may_be_cut = error.pos >= len(self.text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated")
                if may_be_cut and self.more():
                    continue
                raise JsonError(self.line(error.pos), error.msg) from None
            except (ValueError, RecursionError) as error:
                raise JsonError(self.line(), str(error)) from None
            # A number at the end may go on: 12 as 123, 1 as 1.5 or 1e+5.
            if not isinstance(value, int | float) or end + _LONGEST_TOKEN <= len(self.text) or not self.more():
                break
        escapes = any(self.text.find(mark, self.at, end) >= 0 for mark in ("\\ud", "\\uD"))
        self.at = end
        return Entry(value, escapes)
