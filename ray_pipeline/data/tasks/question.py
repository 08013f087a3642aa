"""What a question is, and its line of a file. No randomness, no chat format beyond the `<think>` tags of the answer."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ray_pipeline.errors import UserError
from ray_pipeline.records.integrity import make_again, verify_files

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


def prepared_questions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Questions written by DATA_PREP: prompt, answer, category, difficulty.

    Raises:
        UserError: the file is missing or damaged.
    """
    verify_files(path.parent, [path.name])
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in itertools.islice(lines, limit)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {make_again(path.parent.parent)}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}). {make_again(path.parent.parent)}") from None
