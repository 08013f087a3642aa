"""What a model writes, taken apart as clients expect it: thinking, answer and tool calls. Text alone."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from ray_pipeline.reasoning import State, ThinkStream
from ray_pipeline.tools.calls import ToolCall, own_words, parse_calls
from ray_pipeline.tools.format import CALLS_BEGIN

Field = Literal["reasoning_content", "content"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer's thinking or of the answer itself."""

    field: Field
    text: str


class AnswerParts:
    """Reads text in pieces of any size.

    White space between a mark of thinking and the text beside it is layout and belongs to neither part.

    Args:
        thinking: the prompt ended with `<think>`. tools: calls are looked for.
    Attributes:
        tool_calls: in OpenAI's form, complete after `finish`.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = False):
        state: State = "thinking" if thinking else "normal"
        self._stream, self._tools = ThinkStream(state), tools
        self._trim = thinking  # the next text follows a mark
        self._space = ""  # white space that belongs to the thinking only if more thinking follows
        self._held = ""  # the answer from where a block of calls may begin
        self.tool_calls: list[dict[str, Any]] = []

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain by now."""
        return self._take(self._stream.feed(text))

    def finish(self) -> list[Part]:
        """The end of the text: what was held back, and the calls."""
        parts = self._take(self._stream.finish())
        calls = [call for call in parse_calls(self._held) if isinstance(call, ToolCall)] if self._tools else []
        if calls:
            self._held = own_words(self._held).strip()
            self.tool_calls = [_openai_call(call) for call in calls]
        if self._held:  # no block, or one that cannot be read, which is better seen than lost
            parts.append(Part("content", self._held))
            self._held = ""
        return _merged(parts)

    def whole(self, text: str) -> tuple[str | None, str | None, list[dict[str, Any]]]:
        """Thinking, answer and calls of a complete text; None for what is not there (but an answer of "" if there are
        no calls either)."""
        parts = [*self.feed(text), *self.finish()]
        reasoning, content = (
            "".join(part.text for part in parts if part.field == name) for name in ("reasoning_content", "content")
        )
        return reasoning or None, content or (None if self.tool_calls else ""), self.tool_calls

    def _take(self, events: list[Any]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            if event.kind in ("open", "close"):
                self._trim, self._space = True, ""
                continue
            text = event.text.lstrip() if self._trim else event.text
            if not text:
                continue
            self._trim = False
            if event.kind == "thinking":
                whole = self._space + text
                text = whole.rstrip()
                self._space = whole[len(text) :]
                parts += [Part("reasoning_content", text)] if text else []
            else:
                parts += self._answer(text)
        return _merged(parts)

    def _answer(self, text: str) -> list[Part]:
        if not self._tools:
            return [Part("content", text)]
        self._held += text
        at = self._held.find(CALLS_BEGIN)
        if at < 0:
            at = next(
                (i for i in range(max(0, len(self._held) - len(CALLS_BEGIN) + 1), len(self._held))
                 if CALLS_BEGIN.startswith(self._held[i:])), len(self._held),
            )  # fmt: skip
        ready, self._held = self._held[:at], self._held[at:]
        return [Part("content", ready)] if ready else []


def _merged(parts: list[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        if out and out[-1].field == part.field:
            out[-1] = Part(part.field, out[-1].text + part.text)
        else:
            out.append(part)
    return out


def _openai_call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
