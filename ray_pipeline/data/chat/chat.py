"""Chat templates, rendered with Jinja as transformers does. What of it is learned: `chat_layout`. No tokens here."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from ray_pipeline.data.chat.control_text import ControlStrings
from ray_pipeline.data.chat.template_jinja import TODAY, compile_template, to_json
from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError
from ray_pipeline.tools.format import without_tool_tokens
from ray_pipeline.tools.tool import describe

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
_CALLED = "function_that_is_called"
# What rendering may raise when a template meets messages it was not written for.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

TOOLS_WAY_OUT = (
    "Use --set tokenizer.tools=true with a trained tokenizer, or a chat_template that writes message['tool_calls'] and "
    "the role tool."
)


class Chat(NamedTuple):
    """A conversation to encode.

    Attributes:
        tools: functions the assistant may call, in OpenAI's form.
        trained_from: index of the first message that is trained, if it is the assistant's.
        untrained: indices of the assistant's messages that are not trained all the same.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    trained_from: int = 0
    untrained: frozenset[int] = frozenset()

    @property
    def trained(self) -> list[int]:
        """Indices of the assistant's messages that are trained."""
        candidates = range(self.trained_from, len(self.messages))
        return [i for i in candidates if self.messages[i]["role"] == "assistant" and i not in self.untrained]


class ChatTemplate:
    """A template with the special strings it may use (`bos_token`, `eos_token`, ...).

    Args:
        for_tools: another template, for conversations with tools.
        controls: names of the tokenizer's control tokens. today: the day that a template may ask for.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str],
        *,
        for_tools: str | None = None,
        controls: Iterable[str] = (),
        today: datetime.date = TODAY,
    ):
        self.source, self.special, self.today = source, dict(special), today
        self.controls = ControlStrings(controls)
        self._template = compile_template(source, today=today)
        self._with_tools = None if for_tools is None else ChatTemplate(for_tools, special, today=today)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), generation_prompt: bool = False
    ) -> str:
        """The conversation as text, special tokens written out.

        A template that has no place for tools gets them listed in the system message.

        Raises:
            UserError: the template refuses these messages (an unknown role, say).
        """
        return self._rendered(messages, tools, generation_prompt, marked=False)

    def marked(self, messages: Sequence[Message], tools: Sequence[Tool], *, generation_prompt: bool = False) -> str:
        """The same with the marks of `control_text`: around `{% generation %}`, and where a name of a control token
        comes from a message and not from the template. An answer's marks of reasoning are the model's own tokens.

        The template sees the marks: it cannot take a control token in a message for one that it wrote.
        """
        messages = [self.marked_message(message) for message in messages]
        return self._rendered(messages, self.controls.mark(list(tools)), generation_prompt, marked=True)

    def marked_message(self, message: Message) -> Message:
        """One message as `marked` gives it to the template."""
        keep = (THINK_OPEN, THINK_CLOSE) if message["role"] == "assistant" else ()
        return {
            key: value if key == "role" else self.controls.mark(value, keep if key == "content" else ())
            for key, value in message.items()
        }

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool], generation_prompt: bool, *, marked: bool
    ) -> str:
        if tools and self._with_tools is not None:
            return self._with_tools._rendered(messages, tools, generation_prompt, marked=marked)
        if tools and not self.lists_tools:
            messages, tools = _with_tools_in_system(messages, tools), ()
        try:
            return self._render(messages, tools, generation_prompt, marked=marked)
        except _REFUSALS as error:
            calls = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
            way_out = f". It holds tool calls: {TOOLS_WAY_OUT}" if calls else ""
            raise UserError(f"the chat template refuses the conversation: {error}{way_out}") from None

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], generation_prompt: bool, *, marked: bool = False
    ) -> str:
        called = any(m.get("tool_calls") for m in messages)
        style = self._call_style if called else _CallStyle(None, False)
        return self._written(
            [_for_template(message, style, in_parts=self._takes_parts) for message in messages],
            [dict(tool) for tool in tools] or None,
            generation_prompt,
            marked=marked,
        )

    def _written(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool = False, *, marked: bool = False
    ) -> str:
        template = compile_template(self.source, marked=True, today=self.today) if marked else self._template
        return template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self.special,
        )

    @functools.cached_property
    def lists_tools(self) -> bool:
        """Whether the template itself writes which tools there are."""
        probe = {"name": "list_the_tools", "description": "", "parameters": {"type": "object", "properties": {}}}
        question = {"role": "user", "content": "?"}
        try:
            return "list_the_tools" in self._render([question], [{"type": "function", "function": probe}], False)
        except _REFUSALS:
            return False

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts, as templates for several kinds of media have them."""
        probe = "what is asked"
        for content in (probe, [{"type": "text", "text": probe}]):
            try:
                if probe in self._written([{"role": "user", "content": content}], None):
                    return not isinstance(content, str)
            except _REFUSALS:
                continue
        return False

    @functools.cached_property
    def _call_style(self) -> _CallStyle:
        """How this template wants a turn that calls tools.

        Content that is empty is null in OpenAI's API, but some templates write it as the word None. Arguments are a
        mapping, but DeepSeek's published templates join them to a string, where Python's spelling of a mapping is what
        no model should learn.
        """
        styles = [_CallStyle(empty, as_text) for as_text in (False, True) for empty in (None, "")]
        written = {style: self._called(style) for style in styles}
        fit = {style: text for style, text in written.items() if text is not None and "{'a': 'b'}" not in text}
        # The first of the best: it shows the call, and the word as seldom as any.
        return min(fit, key=lambda style: (_CALLED not in fit[style], fit[style].count("None")), default=styles[0])

    def _called(self, style: _CallStyle) -> str | None:
        """A conversation with one call; None where the template refuses it."""
        call = {"type": "function", "id": "call00000", "function": {"name": _CALLED, "arguments": {"a": "b"}}}
        asked: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return self._written([_for_template(m, style, in_parts=self._takes_parts) for m in asked], None)
        except _REFUSALS:
            return None


class _CallStyle(NamedTuple):
    """Of a turn with calls: what stands for empty content, and whether arguments are JSON text."""

    empty: str | None
    arguments_as_text: bool


def _for_template(message: Message, style: _CallStyle, *, in_parts: bool) -> dict[str, Any]:
    """A message as templates want it; tools' texts cannot pass for calls."""
    out = dict(message)
    if out["role"] == "tool":
        out["content"] = without_tool_tokens(out["content"])
    if out.get("tool_calls"):
        out["content"] = out["content"] or style.empty
        if style.arguments_as_text:
            out["tool_calls"] = [_with_arguments_as_text(call) for call in out["tool_calls"]]
    if in_parts and out["content"] is not None:
        out["content"] = [{"type": "text", "text": out["content"]}]
    return out


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": to_json(function["arguments"])}}


def _with_tools_in_system(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation with its tools listed at the end of its system message."""
    listed = describe(tools)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]
    return [{"role": "system", "content": listed}, *messages]
