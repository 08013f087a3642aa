"""How DeepSeek-V3 writes tool calls and reads what came of them. Strings alone: no tokenizer, no tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# The tokens of DeepSeek-V3's own chat template, spelt as there.
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TOOL_TOKENS = (
    CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, SEPARATOR,
)  # fmt: skip

CALL_TYPE = "function"
JSON_OPEN, JSON_CLOSE = "\n```json\n", "\n```"


def render_call(name: str, arguments: Mapping[str, Any] | str) -> str:
    """One call. Arguments that are text already are written as they are: a template must not reorder them."""
    written = arguments if isinstance(arguments, str) else json.dumps(dict(arguments), ensure_ascii=False)
    return f"{CALL_BEGIN}{CALL_TYPE}{SEPARATOR}{name}{JSON_OPEN}{written}{JSON_CLOSE}{CALL_END}"


def render_calls(calls: Sequence[tuple[str, Mapping[str, Any] | str]]) -> str:
    """What the assistant writes to call tools: (name, arguments) of each, a line for each."""
    return CALLS_BEGIN + "\n".join(render_call(name, arguments) for name, arguments in calls) + CALLS_END


def render_output(outputs: str | Sequence[str]) -> str:
    """What came of the calls, in their order: the text the model goes on after.

    Tool tokens within an output are taken out: a tool's text must not pass for a call or end its block.
    """
    texts = [outputs] if isinstance(outputs, str) else outputs
    blocks = [f"{OUTPUT_BEGIN}{without_tool_tokens(text)}{OUTPUT_END}" for text in texts]
    return OUTPUTS_BEGIN + "\n".join(blocks) + OUTPUTS_END


def without_tool_tokens(text: str) -> str:
    """The text without tool tokens, also those that appear only as others are taken out."""
    while any(token in text for token in TOOL_TOKENS):
        for token in TOOL_TOKENS:
            text = text.replace(token, "")
    return text
