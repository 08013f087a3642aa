"""Chat templates: rendering with Jinja as transformers does, and finding what the assistant said. No tokens here."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from ray_pipeline.data.tasks.question import THINK_OPEN
from ray_pipeline.data.template_limits import BoundedEnvironment
from ray_pipeline.errors import UserError
from ray_pipeline.tools.describe import describe
from ray_pipeline.tools.format import without_tool_tokens

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
# What rendering may raise when a template meets messages it was not written for.
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

_TOOLS_WAY_OUT = (
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


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' marker around answers; its body is passed on."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile in transformers' sandbox settings. `strftime_now` is left out: it would make the data depend on the day.

    Raises:
        UserError: the template is not valid Jinja.
    """
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise
    try:
        return environment.compile_bounded(source)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(
            f"chat template{line}: {error.message}. Mend chat_template in the tokenizer's folder, or use --set "
            "tokenizer.name=train."
        ) from None


class ChatTemplate:
    """A template with the special strings it may use (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special: Mapping[str, str]):
        self.source, self.special = source, dict(special)
        self._template = compile_template(source)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), generation_prompt: bool = False
    ) -> str:
        """The conversation as text, special tokens written out.

        A template that has no place for tools gets them listed in the system message.

        Raises:
            UserError: the template refuses these messages (an unknown role, say).
        """
        if tools and not self._lists_tools:
            messages, tools = _with_tools_in_system(messages, tools), ()
        try:
            return self._render(messages, tools, generation_prompt)
        except _REFUSALS as error:
            calls = any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
            way_out = f". It holds tool calls: {_TOOLS_WAY_OUT}" if calls else ""
            raise UserError(f"the chat template refuses the conversation: {error}{way_out}") from None

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool], generation_prompt: bool) -> str:
        as_text = any(m.get("tool_calls") for m in messages) and self._joins_arguments
        return self._template.render(
            messages=[_for_template(message, as_text) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self.special,
        )

    @functools.cached_property
    def _lists_tools(self) -> bool:
        probe = {"name": "list_the_tools", "description": "", "parameters": {"type": "object", "properties": {}}}
        question = {"role": "user", "content": "?"}
        try:
            return "list_the_tools" in self._render([question], [{"type": "function", "function": probe}], False)
        except _REFUSALS:
            return False

    @functools.cached_property
    def _joins_arguments(self) -> bool:
        """Whether a call's arguments must be text: DeepSeek's published templates join them to a string, where others
        write a mapping as JSON."""
        mapping, text = self._called({"a": "b"}), self._called('{"a": "b"}')
        # Python's spelling of a mapping is what no model should learn.
        return text is not None and (mapping is None or "{'a': 'b'}" in mapping)

    def _called(self, arguments: object) -> str | None:
        """A conversation with one call; None where the template refuses it."""
        call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        try:
            return self._template.render(
                messages=asked, tools=None, documents=None, add_generation_prompt=False, **self.special
            )
        except _REFUSALS:
            return None

    def spans(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the character spans of the trained answers, each from after its generation prompt.

        Found by rendering the conversation up to each answer, without it and with it.

        Raises:
            UserError: the template drops something that the assistant says, or a later turn changes what was rendered
                before, so no span is right (R1's own template, which drops earlier reasoning, is of this kind).
        """
        messages, tools, first, untrained = chat
        text, spans = self.render(messages, tools=tools), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < first or i in untrained:
                continue
            before = self.render(messages[:i], tools=tools, generation_prompt=True)
            after = text if i + 1 == len(messages) else self.render(messages[: i + 1], tools=tools)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"the chat template rewrites turn {i + 1} of {len(messages)} when later turns follow, so its "
                    "tokens cannot be supervised. Use a template that keeps every turn, or one-question conversations."
                )
            _check_kept(message, after[len(before) :])
            spans.append((len(before), len(after)))
        return text, spans


def _for_template(message: Message, arguments_as_text: bool) -> dict[str, Any]:
    """A message as OpenAI's API has it: no content beside calls is null, tools' texts cannot pass for calls."""
    out = dict(message)
    if out["role"] == "tool":
        out["content"] = without_tool_tokens(out["content"])
    if out.get("tool_calls"):
        out["content"] = out["content"] or None
        if arguments_as_text:
            out["tool_calls"] = [_with_arguments_as_text(call) for call in out["tool_calls"]]
    return out


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _to_json(function["arguments"])}}


def _with_tools_in_system(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation with its tools listed at the end of its system message."""
    listed = describe(tools)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listed}"}, *messages[1:]]
    return [{"role": "system", "content": listed}, *messages]


def _check_kept(message: Message, rendered: str) -> None:
    """Raise UserError where the template drops what an assistant's turn says or calls."""
    content = message["content"].strip()
    if content not in rendered:
        lost = f"{THINK_OPEN}...</think> from answers" if THINK_OPEN in content else "words of answers"
        raise UserError(
            f"the chat template drops {lost} (it renders {rendered[:200]!r}), so a model could never learn "
            "them. Edit chat_template to keep the whole content of assistant messages, or use "
            "--set tokenizer.name=train."
        )
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in rendered:
            raise UserError(
                f"the chat template drops tool calls (it renders {rendered[:200]!r} for a call of "
                f"{call['function']['name']}). {_TOOLS_WAY_OUT}"
            )
