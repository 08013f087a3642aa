"""Are tools called as they want to be called? Looks at calls alone, not at what came of them. Never raises.

What is right depends on the reference: one that holds calls as JSON ({"name", "arguments"}, a list of them, or
{"calls": [...]}) names the calls to make; any other leaves it open, and calls need to fit their tools' schemas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calculator import Calculator
from ray_pipeline.tools.calls import BadCall, ToolCall, parse_calls, read_json
from ray_pipeline.tools.format import render_calls
from ray_pipeline.tools.python import Python
from ray_pipeline.tools.tool import described_tools
from ray_pipeline.tools.tool_schema import argument_error

_BUILTIN = {tool.name: tool.parameters for tool in (Calculator, Python)}


def expected_calls(reference: str) -> list[ToolCall] | None:
    """The calls that a reference names; None for one that names none. An empty list: no call is right."""
    found = read_json(reference)
    if isinstance(found, dict) and "calls" in found:
        found = found["calls"]
    calls = [found] if isinstance(found, dict) else found
    if not isinstance(calls, list):
        return None
    made = [_as_call(call) for call in calls]
    return [call for call in made if call is not None] if None not in made else None


def _as_call(call: Any) -> ToolCall | None:
    if not isinstance(call, dict):
        return None
    call = call.get("function", call)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as a JSON text
        arguments = read_json(arguments)
    return ToolCall(call["name"], arguments) if isinstance(arguments, dict) else None


def _demonstrate(reference: str) -> str | None:
    calls = expected_calls(reference)
    return render_calls([(call.name, call.arguments) for call in calls]) if calls else None


@reward("tool_calls", isolated=False, demonstrate=_demonstrate)
def tool_calls(prompt: str, completion: str, reference: str) -> float:
    """Share of calls that are right, 0.0 to 1.0; calls too many, too few or unreadable count as wrong.

    Args:
        prompt: its descriptions of tools (`tools.tool.describe`) tell their schemas; without any, those of calculator
            and python hold.
        reference: the calls to make, or anything else: then a call is right that fits its tool's schema, and a
            completion without a call scores 0.0.
    """
    calls = parse_calls(completion)
    expected = expected_calls(reference)
    if expected is not None:
        most = max(len(expected), len(calls))
        return _matched(calls, expected) / most if most else 1.0
    schemas = described_tools(prompt) or _BUILTIN
    return sum(_fits(call, schemas) for call in calls) / len(calls) if calls else 0.0


def _matched(calls: list[ToolCall | BadCall], expected: list[ToolCall]) -> int:
    left = [(call.name, _typed(call.arguments)) for call in expected]
    found = 0
    for call in calls:
        if isinstance(call, ToolCall) and (made := (call.name, _typed(call.arguments))) in left:
            left.remove(made)
            found += 1
    return found


def _typed(value: Any) -> Any:
    """A JSON value that is equal to another exactly if JSON's is: 1 is 1.0, but not `true`."""
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    return (value,) if isinstance(value, bool) else value


def _fits(call: ToolCall | BadCall, schemas: Mapping[str, Mapping[str, Any]]) -> bool:
    if isinstance(call, BadCall) or call.name not in schemas:
        return False
    try:
        return argument_error(schemas[call.name], call.arguments) is None
    except ValueError:
        return False  # the prompt describes no schema
