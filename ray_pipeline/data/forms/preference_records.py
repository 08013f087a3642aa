"""Records of preference files as pairs of a chosen and a rejected answer to one prompt. No files here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_pipeline.data.chat.chat import Chat
from ray_pipeline.data.files.fields import BadRecord, Record, filled, names, nearest_field, shown
from ray_pipeline.data.forms.chat_records import instruction_turn, prompt_turns, tools_of, with_system
from ray_pipeline.data.forms.turn_fields import refuse_media
from ray_pipeline.data.forms.turns import Message, is_empty, read_tools, read_turns, said, without_flags

# Columns that tell a form, and what it is called in errors; the first that fits is taken.
FORMS = {
    ("conversations", "chosen", "rejected"): "ShareGPT (and system, tools)",
    ("prompt", "chosen", "rejected"): "TRL's, each a text or turns; UltraFeedback's (and system, tools)",
    ("question", "chosen", "rejected"): "one question (and system)",
    ("instruction", "chosen", "rejected"): "Alpaca (and input, system)",
    ("chosen", "rejected"): "TRL's, whole conversations that begin alike (and system, tools)",
}


@dataclass(frozen=True)
class Preference:
    """Two answers to the same prompt.

    Attributes:
        prompt: the turns before the answers. chosen, rejected: the turns of each answer, the last the assistant's.
        tools: functions the assistant may call.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def question(self) -> str:
        """All that is said before the answers: pairs with the same one belong to the same side of a split."""
        return "\n".join(part for message in self.prompt for part in said(message))

    def chats(self) -> tuple[Chat, Chat]:
        """The chosen and the rejected conversation, of which the answer alone counts."""
        first = len(self.prompt)
        chosen, rejected = (Chat((*self.prompt, *answer), self.tools, first) for answer in (self.chosen, self.rejected))
        return chosen, rejected


def as_preference(record: Record) -> Preference:
    """The pair of a record, in the first of FORMS whose columns it has.

    Raises:
        BadRecord: no pair in it.
    """
    form = next((form for form in FORMS if all(column in record for column in form)), None)
    if form is None:
        hint = nearest_field(record, (column for columns in FORMS for column in columns))
        accepted = "; ".join(f"{', '.join(columns)}: {name}" for columns, name in FORMS.items())
        raise BadRecord(f"has {names(record)}{hint}, which is no form of preference. Accepted are {accepted}")
    refuse_media(record)
    if form == ("chosen", "rejected"):
        return _whole_conversations(record)
    prompt = with_system(record, _PROMPTS[form[0]](record))
    if _are_whole(record):
        return _with_its_prompt(_whole_conversations(record), prompt, form[0])
    if not any(message["role"] == "user" for message in prompt):
        raise BadRecord(f'"{form[0]}" must hold a user turn')
    if prompt[-1]["role"] == "assistant":
        raise BadRecord(f'"{form[0]}" must end before the answer, but its last turn is the assistant\'s')
    tools = read_tools(tools_of(record))
    return Preference(without_flags(prompt)[0], _answer(record, "chosen"), _answer(record, "rejected"), tools)


_PROMPTS: dict[str, Callable[[Record], list[Message]]] = {
    "conversations": lambda record: read_turns(record["conversations"], "conversations"),
    "prompt": prompt_turns,
    "question": lambda record: prompt_turns(record, "question"),
    "instruction": lambda record: [instruction_turn(record)],
}


def _are_whole(record: Record) -> bool:
    """Whether the chosen answer is a conversation that begins before the answer, as UltraFeedback's do."""
    chosen = record["chosen"]
    return isinstance(chosen, list) and len(chosen) > 1 and read_turns(chosen, "chosen")[0]["role"] != "assistant"


def _with_its_prompt(pair: Preference, prompt: list[Message], field: str) -> Preference:
    """The pair, if its conversations begin with what stands in the column of the prompt as well.

    Raises:
        BadRecord: they ask something else.
    """
    asked = [turn["content"].strip() for turn in pair.prompt]
    if prompt[-1]["content"].strip() not in asked:
        raise BadRecord(f'"chosen" and "rejected" do not ask what "{field}" asks ({shown(prompt[-1]["content"])})')
    return pair


def _answer(record: Record, field: str) -> tuple[Message, ...]:
    """An answer written as text, as one turn, or as turns."""
    value = record[field]
    if isinstance(value, list | Mapping):
        turns = read_turns(value if isinstance(value, list) else [value], field)
    else:
        turns = [{"role": "assistant", "content": filled(record, field)}]
    return _checked_answer(turns, field)


def _checked_answer(turns: list[Message], field: str) -> tuple[Message, ...]:
    """The turns of an answer as templates see them.

    Raises:
        BadRecord: it is not the assistant's, a turn of it is empty, or not all of it is to be compared.
    """
    roles = [turn["role"] for turn in turns]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        raise BadRecord(f'"{field}" must answer the prompt with an assistant\'s turns, but has {roles}')
    for turn in turns:
        if turn["role"] == "assistant" and is_empty(turn):
            raise BadRecord(f'{"the last" if turn is turns[-1] else "a"} turn of "{field}" is empty')
    answer, untrained = without_flags(turns)
    if untrained:
        raise BadRecord(f'"{field}" has a turn not to be trained, but pairs are compared by whole answers')
    return answer


def _whole_conversations(record: Record) -> Preference:
    """Both conversations whole: what they begin with alike is the prompt."""
    chosen, rejected = (with_system(record, read_turns(record[field], field)) for field in ("chosen", "rejected"))
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    alike = min(alike, len(chosen) - 1, len(rejected) - 1)  # the same answer twice leaves a prompt all the same
    if not any(message["role"] == "user" for message in chosen[:alike]):
        raise BadRecord('"chosen" and "rejected" must begin with the same user turn, or give a "prompt" of their own')
    answers = (_checked_answer(chosen[alike:], "chosen"), _checked_answer(rejected[alike:], "rejected"))
    return Preference(without_flags(chosen[:alike])[0], *answers, read_tools(tools_of(record)))
