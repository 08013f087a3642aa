"""What a tool is, and how a system prompt tells of it (the words of DeepSeek-V3.1's model card)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ray_pipeline.tools.calls import read_json

HEADER = "## Tools\nYou have access to the following tools:\n"
_ENTRY = re.compile(
    r"^### (?P<name>.+)\n(?:Description: (?:(?!^### ).*\n)*?\n)?Parameters: (?P<schema>\{.*\})$", re.MULTILINE
)


class ToolError(Exception):
    """Why a call gave no result, in words for the model."""


class Tool(Protocol):
    """A function that a model may call.

    Attributes:
        name: what the model writes to call it. description: what it is for, a sentence or two.
        parameters: JSON schema of its arguments, of type "object".
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The result as text, for arguments that fit `parameters`.

        Raises:
            ToolError: there is none, for a reason the model is told.
            UserError: the tool cannot work on this machine at all.
        """
        ...


def tool_spec(tool: Tool | Mapping[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI's form, {"type": "function", "function": {"name", "description", "parameters"}}.

    Args:
        tool: one of ours, or of a data set: in this form already, or the inner part of it alone.
    """
    if not isinstance(tool, Mapping):
        inner: Mapping[str, Any] = {
            "name": tool.name, "description": tool.description, "parameters": tool.parameters
        }  # fmt: skip
    else:
        inner = tool.get("function", tool)
    return {"type": "function", "function": dict(inner)}


def describe(tools: Iterable[Tool | Mapping[str, Any]]) -> str:
    """The part of a system prompt that tells a model its tools; empty without any.

    The text that our chat templates write for the same tools.
    """
    entries = [_entry(tool_spec(tool)["function"]) for tool in tools]
    return HEADER + "".join(entries) if entries else ""


def _entry(tool: Mapping[str, Any]) -> str:
    text = f"\n### {tool['name']}\n"
    if tool.get("description"):
        text += f"Description: {tool['description']}\n\n"
    if tool.get("parameters"):
        text += f"Parameters: {json.dumps(tool['parameters'], ensure_ascii=False)}\n"
    return text


def described_tools(text: str) -> dict[str, dict[str, Any]]:
    """Name and schema of each tool that a text describes, in the form of `describe`; tools without one are left out."""
    found = {match["name"]: read_json(match["schema"]) for match in _ENTRY.finditer(text)}
    return {name: schema for name, schema in found.items() if isinstance(schema, dict)}
