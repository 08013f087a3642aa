"""Thinking and answer told apart while a model writes (DeepSeek-R1, arXiv:2501.12948). Text alone: no tokens.

    normal -- <think> --> thinking -- </think> --> answering -- <think> --> thinking ...

A `<think>` within thinking changes nothing (the block is nested); the first `</think>` ends the whole block, as in R1's
own chat template. A `</think>` without a beginning ends thinking that the prompt had begun: answering follows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN

OPEN, CLOSE = THINK_OPEN, THINK_CLOSE

State = Literal["normal", "thinking", "answering"]
Kind = Literal["normal", "thinking", "answering", "open", "close"]
_TAG = re.compile(f"{re.escape(OPEN)}|{re.escape(CLOSE)}")
_KIND: dict[str, Kind] = {OPEN: "open", CLOSE: "close"}


@dataclass(frozen=True)
class Event:
    """A piece of text and what it is: a tag ("open", "close"), or text in the state of that name."""

    kind: Kind
    text: str


class ThinkStream:
    """Reads text in pieces of any size. Joined, the events' texts are what was fed, character for character.

    Attributes:
        state: what the next text will be.
    """

    def __init__(self, state: State = "normal"):
        """
        Args:
            state: "thinking" where the prompt ended with `<think>`, as the templates of R1's later versions do.
        """
        self.state: State = state
        self._held = ""

    def feed(self, text: str) -> list[Event]:
        """The events that are certain by now; what may be the beginning of a tag is held back."""
        text = self._held + text
        events: list[Event] = []
        start = 0
        for tag in _TAG.finditer(text):
            self._add(events, text[start : tag.start()])
            events.append(Event(_KIND[tag[0]], tag[0]))
            self.state = "thinking" if tag[0] == OPEN else "answering"
            start = tag.end()
        held = _begun_tag(text, start)
        self._add(events, text[start : len(text) - held])
        self._held = text[len(text) - held :]
        return events

    def finish(self) -> list[Event]:
        """The end of the text: what was held back was no tag."""
        events: list[Event] = []
        self._add(events, self._held)
        self._held = ""
        return events

    def _add(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Event(self.state, text))


def _begun_tag(text: str, start: int) -> int:
    """Length of the longest end of the text that begins a tag without being one."""
    place = text.rfind("<", max(start, len(text) - len(CLOSE) + 1))
    end = text[place:] if place >= 0 else ""
    return len(end) if end and (OPEN.startswith(end) or CLOSE.startswith(end)) else 0
