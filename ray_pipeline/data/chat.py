"""Chat templates: rendering with Jinja as transformers does, and finding what the assistant said. No tokens here."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ray_pipeline.data.tasks.question import THINK_CLOSE, THINK_OPEN
from ray_pipeline.errors import UserError

Message = Mapping[str, str]

# DeepSeek-V3's turns (arXiv:2412.19437). Nothing is stripped from an answer: the reasoning is what SFT trains.
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' marker around answers; its body is passed on."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile in transformers' sandbox settings. `strftime_now` is left out: it would make the data depend on the day.

    Raises:
        UserError: the template is not valid Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat template, line {error.lineno}: {error.message}. Mend chat_template in the tokenizer's "
            "folder, or use --set tokenizer.name=train."
        ) from None


class ChatTemplate:
    """A template with the special strings it may use (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special: Mapping[str, str]):
        self.source, self.special = source, dict(special)
        self._template = compile_template(source)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text, special tokens written out.

        Raises:
            UserError: the template refuses these messages (an unknown role, say).
        """
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=generation_prompt, **self.special
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the character spans of the answers, each from after its generation prompt.

        Found by rendering the conversation up to each answer, without it and with it.

        Raises:
            UserError: a later turn changes what was rendered before, so no span is right (R1's own template, which
                drops earlier reasoning, is of this kind).
        """
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], generation_prompt=True)
            after = text if i + 1 == len(messages) else self.render(messages[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"the chat template rewrites turn {i + 1} of {len(messages)} when later turns follow, so its "
                    "tokens cannot be supervised. Use a template that keeps every turn, or one-question conversations."
                )
            spans.append((len(before), len(after)))
        return text, spans

    def check_keeps_thinking(self) -> None:
        """Raise UserError for a template that drops the reasoning from an answer, or has no question in it."""
        answer = f"{THINK_OPEN}2+2=4{THINK_CLOSE}4"
        text = self.render([{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": answer}])
        if "What is 2+2?" not in text or answer not in text:
            raise UserError(
                f"the chat template drops {THINK_OPEN}...{THINK_CLOSE} from answers (it renders {text!r}), so a model "
                "could never learn to reason. Edit chat_template to keep the whole content of assistant messages, "
                "or use --set tokenizer.name=train."
            )
