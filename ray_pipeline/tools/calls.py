"""Tool calls found in what a model wrote, in DeepSeek-V3's format. Never raises: a model may write anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray_pipeline.tools.format import (
    CALL_BEGIN,
    CALL_END,
    CALL_TYPE,
    CALLS_BEGIN,
    CALLS_END,
    JSON_CLOSE,
    JSON_OPEN,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEPARATOR,
    TOOL_TOKENS,
)


@dataclass(frozen=True)
class ToolCall:
    """A call that can be read; whether there is such a tool, and it takes these arguments, is another matter."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    """What was meant as a call and cannot be read: the text, and why."""

    text: str
    reason: str


def parse_calls(text: str) -> list[ToolCall | BadCall]:
    """Every call in a text, in order; what stands in tools' outputs is passed over."""
    calls: list[ToolCall | BadCall] = []
    rest = without_outputs(text)
    while rest:
        outside, opened, rest = rest.partition(CALLS_BEGIN)
        if CALL_BEGIN in outside:
            calls.append(BadCall(outside[outside.index(CALL_BEGIN) :], f"a call outside of {CALLS_BEGIN}"))
        if not opened:
            break
        block, closed, rest = rest.partition(CALLS_END)
        calls.extend(_block(block) if closed else [BadCall(opened + block, f"{CALLS_END} is missing")])
    return calls


def without_outputs(text: str) -> str:
    """The text without what tools said; a block that never ends reaches to the end."""
    return _without(text, OUTPUTS_BEGIN, OUTPUTS_END)


def own_words(text: str) -> str:
    """What a model says itself: the text without calls and what tools said."""
    return _without(without_outputs(text), CALLS_BEGIN, CALLS_END)


def _without(text: str, begin: str, end: str) -> str:
    kept = []
    while text:
        own, _, text = text.partition(begin)
        kept.append(own)
        text = text.partition(end)[2]
    return "".join(kept)


def _block(block: str) -> Iterator[ToolCall | BadCall]:
    """The calls between the two tokens of a block."""
    if not block.strip():
        yield BadCall(block, "the block holds no call")
    while block.strip():
        before, opened, rest = block.partition(CALL_BEGIN)
        if before.strip():
            yield BadCall(before, f"text between calls, which begin with {CALL_BEGIN}")
        if not opened:
            return
        call, closed, block = rest.partition(CALL_END)
        yield _call(call) if closed else BadCall(opened + call, f"{CALL_END} is missing")


def _call(text: str) -> ToolCall | BadCall:
    """One call, from `function` to the end of its JSON."""
    kind, separator, rest = text.partition(SEPARATOR)
    if not separator or kind != CALL_TYPE:
        return BadCall(text, f"a call begins with {CALL_TYPE}{SEPARATOR}")
    name, opened, written = rest.partition(JSON_OPEN)
    if not opened or not written.endswith(JSON_CLOSE):
        return BadCall(text, "the arguments must stand between ```json and ```, on lines of their own")
    if not name.strip() or name != name.strip() or "\n" in name:
        return BadCall(text, "the tool's name must stand on a line of its own")
    if any(token in rest for token in TOOL_TOKENS):
        return BadCall(text, "a tool token within a call")
    arguments = read_json(written[: -len(JSON_CLOSE)])
    if not isinstance(arguments, dict):
        return BadCall(text, "the arguments are not a JSON object")
    return ToolCall(name, arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(text: str) -> Any:
    """The value of a JSON text; None where it is not valid JSON (or `null`)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
