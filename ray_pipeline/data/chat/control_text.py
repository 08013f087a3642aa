"""What users, tools and answers say stays text, also where it spells a control token. No tokens, no templates here.

A template writes control tokens by their names, and so could a message: "<|im_end|>" in a question would end the turn.
So the names in contents are marked before a template sees them, and the marks are read back from what it rendered.
Marks are Unicode noncharacters (U+FDD0 to U+FDEF), kept by the standard for use inside a program; a text that holds one
all the same gets it back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

Span = tuple[int, int]

# In a marked text: here a name of a control token is only spelled; a trained part begins, ends; an answer begins.
SPELLED, OPEN, CLOSE, BORDER = MARKS = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
# Before a letter that stands for a mark, or for itself, that a message really holds.
_ESCAPE = "\ufdd4"
_ESCAPED = dict(zip((*MARKS, _ESCAPE), "abcde", strict=True))
_MEANT = {letter: mark for mark, letter in _ESCAPED.items()}
_READ = re.compile(f"{_ESCAPE}([a-e])|([{''.join(MARKS)}])")
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Unmarked(NamedTuple):
    """A marked text taken apart; all numbers are places in `text`.

    Attributes:
        spelled: one place within each name of a control token that is only text.
        trained: what the assistant is to learn. borders: where its answers begin.
    """

    text: str
    spelled: list[int]
    trained: list[Span]
    borders: list[int]


def read_marks(marked: str) -> Unmarked:
    """Inverse of marking."""
    parts: list[str] = []
    length = start = 0
    places: dict[str, list[int]] = {SPELLED: [], OPEN: [], CLOSE: [], BORDER: []}
    for found in _READ.finditer(marked):
        parts.append(marked[start : found.start()] + _MEANT.get(found[1] or "", ""))
        length += len(parts[-1])
        start = found.end()
        if found[2] is not None:
            places[found[2]].append(length)
    parts.append(marked[start:])
    trained = list(zip(places[OPEN], places[CLOSE], strict=True))
    return Unmarked("".join(parts), places[SPELLED], trained, places[BORDER])


def without_marks(marked: str) -> str:
    """The text alone."""
    return _READ.sub(lambda found: _MEANT.get(found[1] or "", ""), marked)


class ControlStrings:
    """The names of a tokenizer's control tokens."""

    def __init__(self, names: Iterable[str]):
        longest_first = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
        named = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._named = re.compile(named)
        self._pattern = re.compile(f"[{''.join(_ESCAPED)}]|{named}")

    def mark(self, value: Any, keep: Collection[str] = ()) -> Any:
        """The same value with the names in all of its texts marked, those of `keep` excepted. Keys are texts too."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: self._marked(found, keep), value)
        if isinstance(value, Mapping):
            return {self.mark(key, keep): self.mark(item, keep) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, keep) for item in value]
        return value

    @staticmethod
    def _marked(found: re.Match[str], keep: Collection[str]) -> str:
        name = found[0]
        if name in _ESCAPED:
            return _ESCAPE + _ESCAPED[name]
        return name if name in keep else name[0] + SPELLED + name[1:]

    def spans(self, text: str, places: Iterable[int]) -> list[Span]:
        """The whole names that have one of the places right behind their first character.

        A template may have changed a text on its way, so that there is no name any more.
        """
        found = (self._named.match(text, place - 1) for place in places if place)
        return [name.span() for name in found if name is not None]
