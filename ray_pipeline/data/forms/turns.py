"""Turns of a conversation, as OpenAI's API and transformers write them (role, content, tool_calls) or as ShareGPT does
(from, value, function_call, observation), brought into one form. No files, no templates here.

The one form is transformers': `{"role", "content"}`, an assistant's calls in "tool_calls" with their arguments as a
mapping, what came of a call in a turn of role "tool".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_pipeline.data.chat.chat import Chat
from ray_pipeline.data.files.fields import BadRecord, Record, shown
from ray_pipeline.data.forms.turn_fields import content_text, is_trained, reasoning_of, refuse_media, with_reasoning
from ray_pipeline.errors import did_you_mean
from ray_pipeline.tools.format import CALL_TYPE, JSON_CLOSE, JSON_OPEN

Message = dict[str, Any]
# "function" is what OpenAI's API called a tool before it had several.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
# ShareGPT's names of them. "function_call" is an assistant's turn too.
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
# In a turn that has just been read: present, and False, where the turn is not to be trained. No template sees it.
_TRAINED = "train"
# What else of a turn some templates write.
_KEPT = {"tool": ("name", "tool_call_id")}


@dataclass(frozen=True)
class Conversation:
    """Turns to learn from.

    Attributes:
        messages: role and content of each turn, calls in "tool_calls"; the last is the assistant's.
        tools: the functions it may call, in OpenAI's form: {"type": "function", "function": {"name", ...}}.
        untrained: indices of the assistant's turns that are read and not learned from.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()

    @property
    def question(self) -> str:
        """The first thing the user says: what makes two conversations the same."""
        return next(str(m["content"]) for m in self.messages if m["role"] == "user")

    @property
    def text(self) -> str:
        """Everything that is said, called or answered, without roles."""
        return "\n".join(part for message in self.messages for part in said(message))

    def chat(self) -> Chat:
        """The whole of it, to encode."""
        return Chat(self.messages, self.tools, untrained=self.untrained)

    def spelled(self) -> list[str]:
        """Every text of it as a template writes it between its tokens."""
        out = [message["content"] for message in self.messages]
        for call in (call["function"] for message in self.messages for call in message.get("tool_calls", ())):
            out += [CALL_TYPE, f"{call['name']}{JSON_OPEN}{_json(call['arguments'])}{JSON_CLOSE}"]
        return out

    @property
    def calls_tools(self) -> bool:
        """Whether any turn is a call or what came of one."""
        return any(message["role"] == "tool" or message.get("tool_calls") for message in self.messages)


def said(message: Message) -> list[str]:
    """What a turn says, and each of its calls."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [message["content"], *(f"{call['name']} {_json(call['arguments'])}" for call in calls)]


def _json(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def conversation_of(messages: Sequence[Message], tools: object, column: str) -> Conversation:
    """The turns as something to learn from.

    Args:
        tools: as the record has them, None for none. column: what the turns are called in errors.
    Raises:
        BadRecord: nobody asks, the end is not an assistant's turn, one of its turns is empty, or none is trained.
    """
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise BadRecord(f'"{column}" must hold a user turn and end with an assistant turn, but has {shown(roles)}')
    if is_empty(messages[-1]):
        raise BadRecord(f'the last of "{column}" is empty, so there is nothing to learn from')
    turns, untrained = without_flags(messages)
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    for count, index in enumerate(answers, start=1):
        if index not in untrained and is_empty(turns[index]):
            raise BadRecord(f'answer {count} of {len(answers)} in "{column}" is empty and would teach to stop at once')
    if untrained.issuperset(answers):
        raise BadRecord(f'every answer in "{column}" is marked as not to be trained, so there is nothing to learn from')
    return Conversation(turns, read_tools(tools), untrained)


def is_empty(message: Message) -> bool:
    """Whether a turn neither says nor calls anything."""
    return not message["content"].strip() and "tool_calls" not in message


def without_flags(messages: Sequence[Message]) -> tuple[tuple[Message, ...], frozenset[int]]:
    """The turns as templates see them, and the indices of those that are not to be trained."""
    untrained = frozenset(index for index, message in enumerate(messages) if not message.get(_TRAINED, True))
    return tuple({k: v for k, v in message.items() if k != _TRAINED} for message in messages), untrained


def read_turns(value: object, column: str) -> list[Message]:
    """A list of turns in either notation, or the same as JSON text.

    Raises:
        BadRecord: naming the turn and what it lacks.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, f'"{column}"')
    if not isinstance(value, list) or not value:
        raise BadRecord(f'"{column}" must be a list of turns, but is {shown(value)}')
    out: list[Message] = []
    for number, turn in enumerate(value, start=1):
        place = f'turn {number} of "{column}"'
        if not isinstance(turn, Mapping):
            raise BadRecord(f'{place} must have a "role" and a "content", but is {shown(turn)}')
        message = read_turn(turn, place)
        called = any("tool_calls" in earlier for earlier in out[-1:]) or (out and out[-1]["role"] == "tool")
        if message["role"] == "tool" and not called:
            raise BadRecord(f"{place} is what came of a call, but no call stands before it")
        if turn.get("from") == "function_call" and out and out[-1]["role"] == "assistant":
            # ShareGPT writes what is said and each call as turns of their own; templates have one turn for them.
            if message.get(_TRAINED) != out[-1].get(_TRAINED):
                raise BadRecord(f"{place} and the words before it are one turn, but one of the two alone is trained")
            out[-1]["tool_calls"] = [*out[-1].get("tool_calls", []), *message["tool_calls"]]
        else:
            out.append(message)
    return out


def read_turn(turn: Record, place: str) -> Message:
    """One turn in either notation; `place` names it in errors."""
    sharegpt = "from" in turn
    role_field, text_field = ("from", "value") if sharegpt else ("role", "content")
    roles = SHAREGPT_ROLES if sharegpt else ROLES
    given = turn.get(role_field)
    if not isinstance(given, str) or given not in roles:
        hint = did_you_mean(given, roles) if isinstance(given, str) else ""
        raise BadRecord(f'{place} needs a "{role_field}" of {", ".join(roles)}, not {shown(given)}{hint}')
    refuse_media(turn, place)
    role, content = roles[given], turn.get(text_field)
    flag = {_TRAINED: False} if not is_trained(turn, role, place) and role == "assistant" else {}
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(content, place)} | flag
    calls = _turn_calls(turn, place)
    if calls is not None and role != "assistant":
        raise BadRecord(f'{place} has "tool_calls", but only an assistant calls tools, not "{given}"')
    if content is None and calls is None:
        raise BadRecord(f'{place} needs a "{text_field}" that is text, not {shown(content)}')
    words, thought = content_text(content, f'{place} needs a "{text_field}"')
    if role == "assistant":
        words = with_reasoning(reasoning_of(turn, place) or thought, words, place)
    message: Message = {"role": role, "content": words}
    message |= {key: turn[key] for key in _KEPT.get(role, ()) if isinstance(turn.get(key), str)} | flag
    return message if calls is None else message | {"tool_calls": calls}


def _turn_calls(turn: Record, place: str) -> list[dict[str, Any]] | None:
    """A turn's calls: several in "tool_calls", or one in "function_call", as OpenAI's API had it first."""
    calls, legacy = turn.get("tool_calls"), turn.get("function_call")
    if calls and legacy:
        raise BadRecord(f'{place} has "tool_calls" and "function_call"; keep one of them')
    return _calls(calls or legacy, place) if calls or legacy else None


def _calls(value: object, place: str) -> list[dict[str, Any]]:
    """Calls as {"type", "function": {"name", "arguments"}}, from OpenAI's form, the bare function, or a list."""
    written, value = isinstance(value, str), _parsed(value, place)
    out = []
    for call in value if isinstance(value, list) else [value]:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise BadRecord(f'{place}: a call needs a "name" and "arguments", not {shown(call)}')
        given = {} if function.get("arguments") is None else function["arguments"]
        arguments = _parsed(given, place) if written or isinstance(given, str) else _present(given)
        if not isinstance(arguments, dict):
            raise BadRecord(f"{place}: the arguments of {name} must be a JSON object, not {shown(arguments)}")
        _check_kind(call, place)
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        out.append(made)
    if not out:
        raise BadRecord(f"{place}: holds no call")
    return out


def read_tools(value: object) -> tuple[dict[str, Any], ...]:
    """The field "tools": a list of functions, in OpenAI's form or bare, or the same as JSON text.

    Raises:
        BadRecord: not JSON, or a tool without a name.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = _parsed(value, '"tools"')
    if not isinstance(tools, list):
        raise BadRecord(f'"tools" must be a list of functions, not {shown(tools)}')
    out = []
    for tool in tools:
        function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRecord(f'each of "tools" needs a "name", not {shown(tool)}')
        _check_kind(tool, '"tools"')
        for field, kind in (("description", str), ("parameters", Mapping)):
            if function.get(field) is not None and not isinstance(function[field], kind):
                raise BadRecord(f'"tools": {field} of {function["name"]} is {shown(function[field])}')
        about = {k: dict(v) if isinstance(v, Mapping) else v for k, v in function.items() if v is not None}
        if not isinstance(value, str):
            about = _present(about)
        out.append({"type": "function", "function": about})
    return tuple(out)


def _check_kind(described: Record, place: str) -> None:
    """Raise BadRecord for a call or a tool that is no function."""
    kind = described.get("type")
    if kind not in (None, "function"):
        raise BadRecord(f'{place}: tools are of the type "function", not {shown(kind)}')


def _present(value: Any) -> Any:
    """The value without the keys that have none.

    Arrow's files have one form for all calls and all tools of a column, so that each shows the keys of every other one,
    as null. A JSON text holds what its author wrote, null included.
    """
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _parsed(value: object, place: str) -> Any:
    """The value, or what a JSON text spells.

    Raises:
        BadRecord: a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{place}: not valid JSON ({error}): {shown(value)}") from None
