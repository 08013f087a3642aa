"""Records of jsonl and parquet files, or of a hub dataset, as documents, conversations and questions. No files here.

Understood fields: `text`; `messages` (role, content); `prompt` + `response`; `question` + `answer` (GSM8K), and
`prompt` + `answer` as DATA_PREP writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_pipeline.data.tasks.question import Question, think

Record = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
_ANNOTATION = re.compile(r"<<[^<>]*>>")
# GSM8K's last line: "#### 72", thousands with commas (arXiv:2110.14168).
_FINAL = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.MULTILINE)


class BadRecord(Exception):
    """A record that does not have what is needed; the reader adds the file and the line."""


@dataclass(frozen=True)
class Conversation:
    """Turns to learn from.

    Attributes:
        messages: role and content of each turn; the last is the assistant's.
    """

    messages: tuple[dict[str, str], ...]

    @property
    def question(self) -> str:
        """The first thing the user says: what makes two conversations the same."""
        return next(m["content"] for m in self.messages if m["role"] == "user")


def as_document(record: Record, column: str | None = None) -> str:
    """The text of a record, for pretraining.

    Raises:
        BadRecord: no field with text.
    """
    if column is not None:
        return _text(record, column)
    if "text" in record:
        return _text(record, "text")
    if "messages" in record:
        return "\n".join(message["content"] for message in _messages(record))
    for first, second in (("prompt", "response"), ("question", "answer"), ("prompt", "answer")):
        if first in record and second in record:
            return f"{_text(record, first)}\n{_text(record, second)}"
    raise BadRecord(f'needs a field "text" (or "messages", "question" and "answer"), but has {_fields(record)}')


def as_conversation(record: Record) -> Conversation:
    """The turns of a record, for SFT. GSM8K's worked steps become the reasoning.

    Raises:
        BadRecord: no conversation in it.
    """
    if "messages" in record:
        messages = _messages(record)
        roles = [m["role"] for m in messages]
        if "user" not in roles or roles[-1] != "assistant":
            raise BadRecord(f'"messages" must hold a user turn and end with an assistant turn, but has {roles}')
        if not messages[-1]["content"].strip():
            raise BadRecord('the last of "messages" is empty, so there is nothing to learn from')
        return Conversation(tuple(messages))
    if "prompt" in record and "response" in record:
        return _one_turn(_filled(record, "prompt"), _filled(record, "response"))
    if "question" in record and "answer" in record:
        steps, final = split_answer(_filled(record, "answer"))
        return _one_turn(_filled(record, "question"), think(steps, final) if steps else final)
    raise BadRecord(
        'needs "messages", "prompt" and "response", or "question" and "answer" to train on, but has ' + _fields(record)
    )


def as_question(record: Record, category: str) -> Question:
    """A question with its exact answer, for GRPO and evaluation.

    Args:
        category: used where the record names none.
    Raises:
        BadRecord: no question, or no answer.
    """
    field = "question" if "question" in record else "prompt"
    if field not in record or "answer" not in record:
        raise BadRecord(f'needs "question" and "answer", but has {_fields(record)}')
    steps, final = split_answer(_filled(record, "answer"))
    difficulty = record.get("difficulty")
    if not isinstance(difficulty, int):
        difficulty = min(5, steps.count("\n") + 1) if steps else 0  # a line of working is a step
    named = record.get("category")
    if isinstance(named, str):
        category = named
    return Question(_filled(record, field).strip(), steps, final, category, difficulty)


def split_answer(answer: str) -> tuple[str, str]:
    """A worked solution as (steps, final answer): the final one stands behind "####"; without that, all of it is final.

    Calculator annotations `<<48/2=24>>` are removed.
    """
    text = _ANNOTATION.sub("", answer).strip()
    finals = list(_FINAL.finditer(text))
    if not finals:
        return "", text
    return text[: finals[-1].start()].strip(), finals[-1][1]


def _one_turn(question: str, response: str) -> Conversation:
    return Conversation(({"role": "user", "content": question.strip()}, {"role": "assistant", "content": response}))


def _fields(record: Record) -> str:
    return ", ".join(f'"{key}"' for key in record) or "no fields at all"


def _text(record: Record, field: str) -> str:
    if field not in record:
        raise BadRecord(f'needs a field "{field}", but has {_fields(record)}')
    value = record[field]
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" must be text, but is {type(value).__name__}')
    return value


def _filled(record: Record, field: str) -> str:
    value = record[field]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # an answer may be written as a number
    if not isinstance(value, str):
        raise BadRecord(f'field "{field}" must be text, but is {type(value).__name__}')
    if not value.strip():
        raise BadRecord(f'field "{field}" is empty')
    return value


def _messages(record: Record) -> list[dict[str, str]]:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadRecord('"messages" must be a list of turns')
    out = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            raise BadRecord(f'each of "messages" needs a "role" of {roles} and a "content" text, not {str(turn)[:80]}')
        out.append({"role": turn["role"], "content": turn["content"]})
    return out
