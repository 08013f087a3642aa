"""A whole completion as data: what was thought, in which steps, and what was answered. Judges nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ray_pipeline.reasoning.stream import Event, State, ThinkStream

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")


@dataclass(frozen=True)
class Reasoned:
    """A completion taken apart.

    Attributes:
        events: its parts, each as long as it gets: two neighbours are never text of the same state.
        state: where it ended: "thinking" is a block that was never closed.
    """

    events: tuple[Event, ...]
    state: State

    @cached_property
    def before(self) -> str:
        """Text before the first tag; all of it where nothing was thought."""
        return self.events[0].text if self.events and self.events[0].kind == "normal" else ""

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Text of each thinking block, with the tags nested in it."""
        blocks: list[list[str]] = []
        inside = False
        for event in self.events:
            if event.kind in ("open", "thinking"):
                if not inside:
                    blocks.append([])
                if inside or event.kind == "thinking":
                    blocks[-1].append(event.text)
            inside = event.kind in ("open", "thinking")
        return tuple("".join(block) for block in blocks)

    @property
    def thinking(self) -> str:
        """All that was thought, a line between blocks."""
        return "\n".join(self.blocks)

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """The thinking's steps: its lines; a line of equations holds one in each, a lone line one in each sentence."""
        lines = [line.strip() for line in self.thinking.splitlines() if line.strip()]
        return tuple(step for line in lines for step in _split(line, alone=len(lines) == 1))

    @cached_property
    def answer(self) -> str | None:
        """What follows the last `</think>`; all of it where nothing was thought; None where thinking never ended."""
        closes = [i for i, event in enumerate(self.events) if event.kind == "close"]
        if closes:
            return "".join(event.text for event in self.events[closes[-1] + 1 :])
        return None if self.opened else self.text

    @property
    def text(self) -> str:
        """The completion itself."""
        return "".join(event.text for event in self.events)

    @cached_property
    def opened(self) -> int:
        """How many `<think>` there are."""
        return sum(event.kind == "open" for event in self.events)

    @cached_property
    def closed(self) -> int:
        """How many `</think>` there are."""
        return sum(event.kind == "close" for event in self.events)

    @property
    def unclosed(self) -> bool:
        """Whether it ends while thinking."""
        return self.state == "thinking"


def _split(line: str, *, alone: bool) -> list[str]:
    words = line.split()
    if len(words) > 1 and all("=" in word.strip("=") for word in words):
        return words
    return _SENTENCE_END.split(line) if alone else [line]


def join_events(events: list[Event]) -> tuple[Event, ...]:
    """The same text in the fewest events: neighbours of one state become one."""
    joined: list[Event] = []
    for event in events:
        if joined and joined[-1].kind == event.kind and event.kind not in ("open", "close"):
            joined[-1] = Event(event.kind, joined[-1].text + event.text)
        else:
            joined.append(event)
    return tuple(joined)


def parse(text: str, state: State = "normal") -> Reasoned:
    """Take a completion apart.

    Args:
        state: "thinking" where its prompt ended with `<think>`.
    """
    stream = ThinkStream(state)
    events = stream.feed(text) + stream.finish()
    return Reasoned(join_events(events), stream.state)
