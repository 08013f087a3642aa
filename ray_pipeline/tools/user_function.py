"""A user's function as a tool: its schema from its signature, its calls in a process that can be killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from ray_pipeline.isolation.function_name import import_function
from ray_pipeline.isolation.function_pool import Call, FunctionPool
from ray_pipeline.tools.tool import ToolError
from ray_pipeline.tools.tool_schema import function_schema

INVOKE = f"{__name__}:invoke"


def invoke(function: str, arguments: dict[str, Any]) -> str:
    """Call "module:function" by keywords; what is not text is written as JSON. Runs in the tool's own process."""
    value = import_function(function, "tool")(**arguments)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


class FunctionTool:
    """The tool that "module:function" means, under the function's own name.

    Its process lives as long as the tool, so a module may keep what is slow to load. Used from one thread at a time.
    """

    def __init__(self, where: str, timeout_seconds: float):
        """
        Raises:
            UserError: the function is not there, has no docstring, or parameters that have no schema.
        """
        self.name = where.partition(":")[2]
        self.parameters: Mapping[str, Any]
        self.description, self.parameters = function_schema(import_function(where, "tool"), where)
        self.where = where
        self._pool = FunctionPool([where, INVOKE], timeout_seconds=timeout_seconds, processes=1)
        self._turn = threading.Lock()

    def call(self, arguments: Mapping[str, Any]) -> str:
        """What the function returned.

        Raises:
            ToolError: it raised, hung or died.
            UserError: it cannot be imported in a process of its own.
        """
        with self._turn:
            (outcome,) = self._pool.run([Call(INVOKE, (self.where, dict(arguments)))])
        if outcome.error is not None:
            raise ToolError(outcome.error)
        return str(outcome.value)

    def close(self) -> None:
        """End its process."""
        self._pool.close()
