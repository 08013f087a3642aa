"""Tools by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.tools.calculator import Calculator
from ray_pipeline.tools.python import Python
from ray_pipeline.tools.tool import Tool
from ray_pipeline.tools.user_function import FunctionTool

BUILTIN: dict[str, Callable[[float, bool], Tool]] = {"calculator": lambda *_: Calculator(), "python": Python}


def get_tool(name: str, *, timeout_seconds: float = 5.0, without_landlock: bool = False) -> Tool:
    """The tool of that name: calculator, python, or a function as "module:function".

    Raises:
        UserError: naming the tools there are; or that a function cannot be a tool.
    """
    if name in BUILTIN:
        return BUILTIN[name](timeout_seconds, without_landlock)
    if ":" in name:
        return FunctionTool(name, timeout_seconds)
    raise UserError(
        f'tool "{name}" is not known{did_you_mean(name, BUILTIN)}. Known: {", ".join(sorted(BUILTIN))}, and functions '
        'of your own as "module:function".'
    )


def check_tool_names(names: Sequence[str], *, without_landlock: bool = False) -> None:
    """Raise UserError unless every tool of a config can be had here. Cheap: no torch, no Ray, no process is left.

    A module of the user's is imported; the sandbox is tried where a tool needs it.
    """
    seen: dict[str, str] = {}
    for given in names:
        tool = get_tool(given)
        if tool.name in seen:
            raise UserError(
                f'tools.names: "{seen[tool.name]}" and "{given}" are both called {tool.name}. '
                "Leave one out, or rename the function."
            )
        seen[tool.name] = given
    if "python" in names:
        from ray_pipeline.isolation.sandbox import check_sandbox

        check_sandbox(without_landlock=without_landlock)
