"""Records of json, jsonl and parquet files, or of a hub dataset, as documents and conversations. No files here.

A conversation's form is told by its columns: see FORMS. Questions are in `question_records`, pairs in
`preference_records`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray_pipeline.data.files.fields import BadRecord, Record, filled, glance, names, nearest_field, optional_text, text
from ray_pipeline.data.forms.question_records import BEFORE, CHOICES, SYSTEM, answer_of, question_text
from ray_pipeline.data.forms.turn_fields import REASONING, reasoning_of, refuse_media, with_reasoning
from ray_pipeline.data.forms.turns import Conversation, Message, conversation_of, read_turns, said
from ray_pipeline.data.tasks.question import think


@dataclass(frozen=True)
class Form:
    """A form of conversations. Attributes: needs: the columns that tell it."""

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Record], Conversation]

    def __str__(self) -> str:
        needs = " and ".join(f'"{column}"' for column in self.needs)
        return f"{needs}: {self.name}"


def as_document(record: Record, column: str | None = None) -> str:
    """The text of a record, for pretraining: a column, or what is said in it, its system message first.

    Raises:
        BadRecord: no field with text; images or sound beside it, unless the column is named.
    """
    if column is not None:
        return text(record, column)
    refuse_media(record)
    if "text" in record:
        return text(record, "text")
    if "messages" in record:
        turns = with_system(record, read_turns(record["messages"], "messages"))
        return "\n".join(part for turn in turns for part in said(turn))
    for first, second in (("prompt", "response"), ("question", "answer"), ("prompt", "answer")):
        if first in record and second in record:
            asked = (str(turn["content"]) for turn in system_turns(record))
            return "\n".join([*asked, question_text(record, first), text(record, second)])
    raise BadRecord(f'needs a field "text" (or "messages", "question" and "answer"), but has {names(record)}')


def as_conversation(record: Record) -> Conversation:
    """The turns of a record, for SFT, in the first of FORMS whose columns it has.

    Raises:
        BadRecord: no conversation in it.
    """
    for form in FORMS:
        if all(column in record for column in form.needs):
            refuse_media(record)
            _refuse_bad_answer(record)
            return form.convert(record)
    hint = nearest_field(record, (column for form in FORMS for column in form.needs))
    accepted = "; ".join(map(str, FORMS))
    raise BadRecord(
        f"has {names(record)}{hint}, which is no form of conversation. Accepted are {accepted}. Beside them are read "
        f"{', '.join(ASIDE)}"
    )


def _refuse_bad_answer(record: Record) -> None:
    """Raise BadRecord for KTO's label of an answer that nobody should give."""
    label = glance(record, "label")
    if isinstance(label, int) and label in (0, 1) and not record.get("label"):
        raise BadRecord('"label" is false: it marks a bad answer (KTO), which would be learned as a good one')


def prompt_turns(record: Record, field: str = "prompt") -> list[Message]:
    """A prompt as turns: text is one question, a list is the conversation so far.

    Raises:
        BadRecord: neither, or empty.
    """
    if isinstance(record[field], list):
        return read_turns(record[field], field)
    return [{"role": "user", "content": question_text(record, field)}]


def system_turns(record: Record) -> list[Message]:
    """The column "system" or "system_prompt" as a turn; none where it is missing or empty."""
    for name in SYSTEM:
        system = optional_text(record, name)
        if system.strip():
            return [{"role": "system", "content": system}]
    return []


def with_system(record: Record, turns: list[Message]) -> list[Message]:
    """The turns after the record's own column of the system message, if it has one.

    Raises:
        BadRecord: the turns begin with another system message.
    """
    system = system_turns(record)
    if system and turns[0]["role"] == "system":
        if system[0]["content"].strip() != turns[0]["content"].strip():
            raise BadRecord("has two system messages, a column of its own and the first turn. Keep one of them")
        return turns
    return system + turns


def tools_of(record: Record) -> object:
    """The functions that may be called, as the record has them; "functions" is OpenAI's first name of them."""
    return record.get("tools") or record.get("functions")


def instruction_turn(record: Record) -> Message:
    """Alpaca's question: the instruction and, on a line of its own, its input; Dolly's, with its context before it."""
    given = optional_text(record, "input").strip()
    question = "\n".join(part for part in (question_text(record, "instruction"), given) if part)
    return {"role": "user", "content": question}


def _answer(record: Record, field: str) -> Message:
    """An answer that is text, with the record's column of reasoning before it."""
    words = filled(record, field)
    return {"role": "assistant", "content": with_reasoning(reasoning_of(record, "the record"), words, "the record")}


def _completed(record: Record, asked: str, answer: str) -> Conversation:
    """A prompt and its answer, each a text or a list of turns, as TRL has them."""
    ending = read_turns(record[answer], answer) if isinstance(record[answer], list) else [_answer(record, answer)]
    turns = with_system(record, prompt_turns(record, asked))
    return conversation_of([*turns, *ending], tools_of(record), answer)


def _turns(record: Record, column: str) -> Conversation:
    return conversation_of(with_system(record, read_turns(record[column], column)), tools_of(record), column)


def _alpaca(record: Record, answer: str) -> Conversation:
    messages = system_turns(record)
    history = [] if record.get("history") is None else record["history"]
    if not isinstance(history, list):
        raise BadRecord(f'field "history" must be a list of [question, answer] pairs, but is {type(history).__name__}')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRecord(f'pair {number} of "history" must be a question and an answer, but is {str(pair)[:80]}')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return conversation_of([*messages, instruction_turn(record), _answer(record, answer)], None, answer)


def _solved(record: Record, asked: str) -> Conversation:
    """A question with its answer; worked steps, GSM8K's or MATH's, become the reasoning."""
    steps, final = answer_of(record)
    thought = reasoning_of(record, "the record")
    if steps and thought:
        raise BadRecord("has a worked answer and reasoning beside it. Keep one of them")
    answer = with_reasoning(thought, think(steps, final) if steps else final, "the record")
    turns = [*with_system(record, prompt_turns(record, asked)), {"role": "assistant", "content": answer}]
    return conversation_of(turns, tools_of(record), "answer")


FORMS = (
    Form("turns with role and content", ("messages",), lambda record: _turns(record, "messages")),
    Form("ShareGPT", ("conversations",), lambda record: _turns(record, "conversations")),
    Form("Alpaca", ("instruction", "output"), lambda record: _alpaca(record, "output")),
    Form("Dolly", ("instruction", "response"), lambda record: _alpaca(record, "response")),
    Form("one question", ("prompt", "response"), lambda record: _completed(record, "prompt", "response")),
    Form("TRL's", ("prompt", "completion"), lambda record: _completed(record, "prompt", "completion")),
    Form("OpenOrca", ("question", "response"), lambda record: _completed(record, "question", "response")),
    Form("MetaMath", ("query", "response"), lambda record: _completed(record, "query", "response")),
    Form("GSM8K", ("question", "answer"), lambda record: _solved(record, "question")),
    Form("MATH", ("problem", "solution"), lambda record: _solved(record, "problem")),
)
# Columns that are read beside those that tell a form, where the form has a place for them.
ASIDE = (*SYSTEM, "tools", "functions", "input", "history", *BEFORE, *CHOICES, *REASONING)
