"""Records of json, jsonl and parquet files, or of a hub dataset, as documents, conversations and questions. No files
here.

A conversation's form is told by its columns: see FORMS. Questions have `question` + `answer` (GSM8K), or `prompt` +
`answer` as DATA_PREP writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ray_pipeline.data.fields import BadRecord, Record, filled, names, nearest_field, optional_text, text
from ray_pipeline.data.tasks.question import Question, think
from ray_pipeline.data.turns import Conversation, Message, conversation_of, read_turns, said

__all__ = [
    "FORMS",
    "BadRecord",
    "Conversation",
    "Record",
    "as_conversation",
    "as_document",
    "as_question",
    "instruction_turn",
    "prompt_turns",
    "split_answer",
    "system_turns",
]

_ANNOTATION = re.compile(r"<<[^<>]*>>")
# GSM8K's last line: "#### 72", thousands with commas (arXiv:2110.14168).
_FINAL = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """A form of conversations.

    Attributes:
        needs: the columns that tell it. may: further columns that are read.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    convert: Callable[[Record], Conversation]

    def __str__(self) -> str:
        needs = " and ".join(f'"{column}"' for column in self.needs)
        may = f" (and {', '.join(self.may)})" if self.may else ""
        return f"{needs}{may}: {self.name}"


def as_document(record: Record, column: str | None = None) -> str:
    """The text of a record, for pretraining.

    Raises:
        BadRecord: no field with text.
    """
    if column is not None:
        return text(record, column)
    if "text" in record:
        return text(record, "text")
    if "messages" in record:
        return "\n".join(part for turn in read_turns(record["messages"], "messages") for part in said(turn))
    for first, second in (("prompt", "response"), ("question", "answer"), ("prompt", "answer")):
        if first in record and second in record:
            return f"{text(record, first)}\n{text(record, second)}"
    raise BadRecord(f'needs a field "text" (or "messages", "question" and "answer"), but has {names(record)}')


def as_conversation(record: Record) -> Conversation:
    """The turns of a record, for SFT, in the first of FORMS whose columns it has.

    Raises:
        BadRecord: no conversation in it.
    """
    for form in FORMS:
        if all(column in record for column in form.needs):
            return form.convert(record)
    hint = nearest_field(record, (column for form in FORMS for column in (*form.needs, *form.may)))
    accepted = "; ".join(map(str, FORMS))
    raise BadRecord(f"has {names(record)}{hint}, which is no form of conversation. Accepted are {accepted}")


def as_question(record: Record, category: str) -> Question:
    """A question with its exact answer, for GRPO and evaluation.

    Args:
        category: used where the record names none.
    Raises:
        BadRecord: no question, or no answer.
    """
    field = "question" if "question" in record else "prompt"
    if field not in record or "answer" not in record:
        hint = nearest_field(record, ("question", "prompt", "answer"))
        raise BadRecord(f'needs "question" and "answer", but has {names(record)}{hint}')
    steps, final = split_answer(filled(record, "answer"))
    difficulty = record.get("difficulty")
    if not isinstance(difficulty, int):
        difficulty = min(5, steps.count("\n") + 1) if steps else 0  # a line of working is a step
    named = record.get("category")
    if isinstance(named, str):
        category = named
    return Question(filled(record, field).strip(), steps, final, category, difficulty)


def split_answer(answer: str) -> tuple[str, str]:
    """A worked solution as (steps, final answer): the final one stands behind "####"; without that, all of it is final.

    Calculator annotations `<<48/2=24>>` are removed.
    """
    text = _ANNOTATION.sub("", answer).strip()
    finals = list(_FINAL.finditer(text))
    if not finals:
        return "", text
    return text[: finals[-1].start()].strip(), finals[-1][1]


def prompt_turns(record: Record, field: str = "prompt") -> list[Message]:
    """A prompt as turns: text is one question, a list is the conversation so far.

    Raises:
        BadRecord: neither, or empty.
    """
    if isinstance(record[field], list):
        return read_turns(record[field], field)
    return [{"role": "user", "content": filled(record, field).strip()}]


def system_turns(record: Record) -> list[Message]:
    """The column "system" as a turn; none where it is missing or empty."""
    system = optional_text(record, "system")
    return [{"role": "system", "content": system}] if system.strip() else []


def tools_of(record: Record) -> object:
    """The functions that may be called, as the record has them; "functions" is OpenAI's first name of them."""
    return record.get("tools") or record.get("functions")


def instruction_turn(record: Record) -> Message:
    """Alpaca's question: the instruction and, on a line of its own, its input."""
    given = optional_text(record, "input").strip()
    question = "\n".join(part for part in (filled(record, "instruction").strip(), given) if part)
    return {"role": "user", "content": question}


def _completed(record: Record, answer: str) -> Conversation:
    """prompt + response or completion, each a text or a list of turns, as TRL has them."""
    if isinstance(record[answer], list):
        ending = read_turns(record[answer], answer)
    else:
        ending = [{"role": "assistant", "content": filled(record, answer)}]
    return conversation_of([*prompt_turns(record), *ending], tools_of(record), answer)


def _messages(record: Record) -> Conversation:
    return conversation_of(read_turns(record["messages"], "messages"), tools_of(record), "messages")


def _sharegpt(record: Record) -> Conversation:
    turns = system_turns(record) + read_turns(record["conversations"], "conversations")
    return conversation_of(turns, tools_of(record), "conversations")


def _alpaca(record: Record) -> Conversation:
    messages = system_turns(record)
    history = [] if record.get("history") is None else record["history"]
    if not isinstance(history, list):
        raise BadRecord(f'field "history" must be a list of [question, answer] pairs, but is {type(history).__name__}')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRecord(f'pair {number} of "history" must be a question and an answer, but is {str(pair)[:80]}')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = {"role": "assistant", "content": filled(record, "output")}
    return conversation_of([*messages, instruction_turn(record), answer], None, "output")


def _solved(record: Record) -> Conversation:
    """A question with its answer; GSM8K's worked steps become the reasoning."""
    steps, final = split_answer(filled(record, "answer"))
    question = {"role": "user", "content": filled(record, "question").strip()}
    return Conversation((question, {"role": "assistant", "content": think(steps, final) if steps else final}))


FORMS = (
    Form("turns with role and content", ("messages",), ("tools",), _messages),
    Form("ShareGPT", ("conversations",), ("system", "tools"), _sharegpt),
    Form("Alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Form("one question", ("prompt", "response"), ("tools",), lambda record: _completed(record, "response")),
    Form("TRL's", ("prompt", "completion"), ("tools",), lambda record: _completed(record, "completion")),
    Form("GSM8K", ("question", "answer"), (), _solved),
)
