"""Jinja as transformers sets it up for chat templates, within the bounds of `template_limits`. No chats, no tokens."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from ray_pipeline.data.chat.control_text import CLOSE, OPEN, SPELLED
from ray_pipeline.data.chat.template_limits import BoundedEnvironment
from ray_pipeline.errors import UserError

# The day that `strftime_now` tells where no other is set: rows must not depend on the day they are made.
TODAY = datetime.date(2025, 1, 1)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' sign around answers; its body is passed on."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_passed_on"), [], [], body).set_lineno(line)

    def _passed_on(self, caller: Callable[[], str]) -> str:
        return caller()


class _MarkedGeneration(_Generation):
    """The same, with marks around the answer."""

    def _passed_on(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _written_day(day: datetime.date, form: str) -> str:
    """The day as `strftime` writes it."""
    if len(form) > _LONGEST_FORM or _WIDTH.search(form):
        raise jinja2.TemplateError(f"strftime_now({form[:40]!r}): formats are short, and their fields have no widths")
    return day.strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter `tojson`, which escapes no HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # A mark stays one, so that it is found again.
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


_LONGEST_FORM, _WIDTH = 200, re.compile(r"%[^a-zA-Z%]*\d")
_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{SPELLED}]")


@functools.lru_cache(maxsize=32)
def compile_template(source: str, *, marked: bool = False, today: datetime.date = TODAY) -> jinja2.Template:
    """Compile in transformers' sandbox settings.

    Args:
        marked: write marks where `{% generation %}` begins and ends. today: what `strftime_now` says.
    Raises:
        UserError: the template is not valid Jinja.
    """
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_MarkedGeneration if marked else _Generation, "jinja2.ext.loopcontrols"],
    )
    environment.add_filter("tojson", to_json)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = functools.partial(_written_day, today)
    try:
        return environment.compile_bounded(source)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(
            f"chat template{line}: {error.message}. Fix chat_template in the tokenizer's folder, or use --set "
            "tokenizer.name=train."
        ) from None


@functools.lru_cache(maxsize=16)
def literal_text(source: str) -> str:
    """What a template itself may write: its text and its string constants, with a null character between them."""
    tree = compile_template(source).environment.parse(source)
    found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    found += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(found)
