"""What a tool is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


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
