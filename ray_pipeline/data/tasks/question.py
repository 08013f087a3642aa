"""What a built-in question is. No randomness, no chat format beyond the `<think>` tags of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Worked(NamedTuple):
    """A question as its generator makes it: text, short mechanical steps, exact answer."""

    prompt: str
    steps: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question with one exact answer.

    Attributes:
        steps: worked steps, the text between the think tags.
        difficulty: 1 (easiest) to 5; 0 where it is unknown.
    """

    prompt: str
    steps: str
    answer: str
    category: str
    difficulty: int

    @property
    def completion(self) -> str:
        """What the assistant says: `<think>steps</think>answer`."""
        return think(self.steps, self.answer)

    @property
    def at_a_glance(self) -> str:
        """The answer without working."""
        return think("At a glance.", self.answer)

    def record(self) -> dict[str, Any]:
        """The line of prompts/*.jsonl."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "category": self.category,
            "difficulty": self.difficulty,
        }


def think(steps: str, answer: str) -> str:
    """`<think>steps</think>answer`."""
    return f"{THINK_OPEN}{steps}{THINK_CLOSE}{answer}"
