"""Jinja for templates that strangers wrote: bounded in steps, time and what it makes. No chats, no tokens.

jinja2's sandbox keeps a template from Python's insides, but lets it loop for hours, or make a text of 10 GB. Here loops
and macros count their rounds, and operators, filters and calls what they make; a template that goes beyond is refused.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

SOURCE_CHARACTERS = 1_000_000
RENDER_SECONDS = 1.0  # of computing; a conversation takes milliseconds, and a template is tried in several ways
RENDER_CHARACTERS = 100_000_000  # made by all steps together; a text that grows by pieces is counted each time
MAX_ARGUMENT = 100_000  # as jinja2 bounds range(); a wider column, a longer fill
MAX_INTEGER_BITS = 4096
_NOT_USED = ("expandtabs", "translate", "maketrans")  # methods of text that grow it, and that no template needs
_WRITES = ("join", "string", "tojson", "pprint", "format", "sum", "urlencode", "xmlattr")  # filters that write it out
# %1000000000d, {:>1000000000}, and widths that are arguments themselves.
_WIDE = re.compile(r"\d{5,}|%[^%]*\*|\{[^{}]*\{")


class TemplateTooLarge(jinja2.TemplateError):
    """A template went on for too long, or made too much."""


class _Meter(threading.local):
    """What the rendering in this thread has used."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.left, self.deadline = RENDER_CHARACTERS, time.thread_time() + RENDER_SECONDS

    def tick(self) -> str:
        if time.thread_time() > self.deadline:
            raise TemplateTooLarge(f"it renders for more than {RENDER_SECONDS:g} seconds")
        return ""

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TemplateTooLarge(f"it makes more than {RENDER_CHARACTERS} characters")
        self.tick()


class _BoundedTemplate(jinja2.Template):
    """A template whose `render` is bounded."""

    def render(self, *arguments: Any, **values: Any) -> str:
        """The template's text.

        Raises:
            jinja2.TemplateError: also where it goes beyond a bound; and what templates raise for unfit messages.
        """
        assert isinstance(self.environment, BoundedEnvironment)
        meter = self.environment.meter
        meter.start()
        pieces = []
        try:
            for piece in self.generate(*arguments, **values):
                meter.spend(len(piece))
                pieces.append(piece)
        except RecursionError:
            raise TemplateTooLarge("it calls itself without end") from None
        except MemoryError:
            raise TemplateTooLarge("it needs more memory than there is") from None
        return "".join(pieces)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with bounds on what its templates use."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    template_class = _BoundedTemplate

    def __init__(self, **options: Any):
        self.meter = _Meter()
        super().__init__(finalize=self.measured, **options)
        del self.globals["lipsum"]
        self.filters = {name: self._bounded(function) for name, function in self.filters.items() if name != "urlize"}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that is counted as the built-in ones are."""
        self.filters[name] = self._bounded(function)

    def compile_bounded(self, source: str) -> jinja2.Template:
        """The template.

        Raises:
            jinja2.TemplateError: no valid Jinja, or larger or nested deeper than a template can need.
        """
        if len(source) > SOURCE_CHARACTERS:
            raise TemplateTooLarge(f"{len(source)} characters, more than the {SOURCE_CHARACTERS} a template may have")
        self.meter.start()
        try:
            return self.from_string(source)
        except (RecursionError, MemoryError):
            raise TemplateTooLarge("it is nested too deep") from None
        except (SyntaxError, ValueError, OverflowError) as error:  # of the Python that it is translated to
            raise TemplateTooLarge(f"it cannot be compiled ({error})") from None

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            node.body.insert(0, jinja2.nodes.ExprStmt(_call("tick", [])).set_lineno(node.lineno))  # type: ignore[attr-defined]
        _measure_literals(tree)
        return tree.set_environment(self)  # type: ignore[return-value]

    def tick(self) -> str:
        """Called each time around a loop."""
        return self.meter.tick()

    def measured(self, value: Any) -> Any:
        """The value, once it is known how much text it comes to; what holds itself comes to no end and is refused."""
        if isinstance(value, str):
            return value
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.meter.spend(len(item))
            elif isinstance(item, list | tuple | dict):
                self.meter.spend(1 + len(item))
                stack.extend(item)
                stack.extend(item.values() if isinstance(item, dict) else ())
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be large: measured before it is computed."""
        sizes = [len(side) if isinstance(side, str | list | tuple) else 0 for side in (left, right)]
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "+":
            self.meter.spend(sum(sizes))
        elif operator == "*" and any(sizes):
            self.meter.spend(max(sizes) * max(0, *(side for side in (left, right) if isinstance(side, int)), 0))
        elif operator == "*" and whole and left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise TemplateTooLarge("it makes a number of too many digits")
        elif operator == "**" and whole and left.bit_length() * max(right, 0) > MAX_INTEGER_BITS:
            raise TemplateTooLarge("it makes a number of too many digits")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """A call of a method, macro or function: arguments bounded, its text counted."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # str.format comes wrapped
        if isinstance(owner, str):
            self._check_growth(owner, getattr(function, "__name__", ""), arguments, named)
        return self._counted(super().call(context, function, *arguments, **named))

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.removeprefix("sync_").removeprefix("do_")
        passed = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

        @functools.wraps(function)
        def bounded(*arguments: Any, **named: Any) -> Any:
            before, (value, *others) = arguments[:passed], arguments[passed:]
            if name in _WRITES:
                if not isinstance(value, str | list | tuple | dict | Mapping) and hasattr(value, "__next__"):
                    value = list(value)
                self.measured(value)
            self._check_growth(value, name, tuple(others), named)
            return self._counted(function(*before, value, *others, **named))

        return bounded

    def joined(self, *parts: Any) -> str:
        """What `~` stands for."""
        texts = [str(self.measured(part)) for part in parts]
        self.meter.spend(sum(map(len, texts)))
        return "".join(texts)

    def _counted(self, made: Any) -> Any:
        self.meter.spend(len(made) if isinstance(made, str | list | tuple) else 1)
        return made

    def _check_growth(self, value: Any, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Before a method or filter makes something of a text: how large can it be?"""
        given = (*arguments, *named.values())
        if any(isinstance(number, int) and abs(number) > MAX_ARGUMENT for number in given):
            if name not in ("format", "format_map", "join", "default", "string"):
                raise TemplateTooLarge(f"it asks for a width or count of more than {MAX_ARGUMENT}")
        if name in _NOT_USED:
            raise TemplateTooLarge(f"it uses {name}")
        texts = [text for text in given if isinstance(text, str)]
        if name == "join":
            self.measured(given)
            separator = value if isinstance(value, str) else "".join(texts)
            self.meter.spend(len(separator) * max(len(part) for part in (value, *given) if hasattr(part, "__len__")))
        elif name in ("replace", "indent", "wordwrap") and isinstance(value, str):
            times = value.count(texts[0]) if name == "replace" and texts else len(value)
            self.meter.spend(times * max(map(len, texts), default=0))
        elif name in ("format", "format_map") and isinstance(value, str):
            self._check_format(value, given)

    def _check_format(self, text: str, given: Any) -> None:
        if _WIDE.search(text):
            raise TemplateTooLarge("it formats with a width that is too large, or is computed")
        before = self.meter.left
        self.measured(given if not isinstance(given, str) else [given])
        self.meter.spend((text.count("%") + text.count("{")) * (before - self.meter.left))


def _call(name: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    # An attribute of the environment: a name could be given another meaning by the template.
    return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _measuring(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    """`a ~ b ~ c` becomes a call that measures what it joins, `[a, b]` one that measures what it holds."""
    if isinstance(node, jinja2.nodes.Concat):
        return _call("joined", node.nodes).set_lineno(node.lineno)
    literal = isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict)
    if literal and not all(isinstance(inner, jinja2.nodes.Const) for inner in node.iter_child_nodes()):
        return _call("measured", [node]).set_lineno(node.lineno)  # type: ignore[list-item]
    return node


def _measure_literals(node: jinja2.nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            for place, inner in enumerate(value):
                if isinstance(inner, jinja2.nodes.Node):
                    _measure_literals(inner)
                    value[place] = _measuring(inner)
        elif isinstance(value, jinja2.nodes.Node):
            _measure_literals(value)
            setattr(node, field, _measuring(value))
