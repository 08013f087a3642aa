"""The tools of a run: calls of a model carried out and counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray_pipeline.hardware import num_cpus
from ray_pipeline.tools.calls import BadCall, ToolCall
from ray_pipeline.tools.known_tools import get_tool
from ray_pipeline.tools.tool import Tool, ToolError, tool_spec
from ray_pipeline.tools.tool_schema import argument_error

if TYPE_CHECKING:
    from ray_pipeline.settings.post_training import ToolsConfig

MAX_OUTPUT_CHARACTERS = 2000
UNREADABLE = "(unreadable)"


class ToolBox:
    """Carries out calls. What goes wrong is told to the model as text, and counted.

    Attributes:
        calls: by tool, how many were made; unknown tools and calls that cannot be read under `UNREADABLE`.
        errors: of these, how many gave no result. first_error: the first one's text, for the log.
    """

    def __init__(self, settings: ToolsConfig):
        """
        Raises:
            UserError: an unknown tool.
        """
        seconds, without_landlock = settings.timeout_seconds, settings.without_landlock
        made = [get_tool(n, timeout_seconds=seconds, without_landlock=without_landlock) for n in settings.names]
        self.tools: dict[str, Tool] = {tool.name: tool for tool in made}
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.first_error: str | None = None
        self._counting = threading.Lock()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of users' functions."""
        for tool in self.tools.values():
            if hasattr(tool, "close"):
                tool.close()

    @property
    def specs(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form, as chat templates take them."""
        return [tool_spec(tool) for tool in self.tools.values()]

    def call(self, call: ToolCall | BadCall) -> str:
        """The result as text, or "Error: ..." for the model to read; never too long to read.

        Raises:
            UserError: the tool cannot work on this machine at all (see `check_tool_names`); no fault of the model's.
        """
        known = isinstance(call, ToolCall) and call.name in self.tools
        name = call.name if isinstance(call, ToolCall) and known else UNREADABLE
        try:
            text, failed = self._result(call), False
        except ToolError as error:
            text, failed = f"Error: {error}", True
        with self._counting:
            self.calls[name] += 1
            self.errors[name] += failed
            if failed and self.first_error is None:
                self.first_error = f"{name}: {text}"
        more = len(text) - MAX_OUTPUT_CHARACTERS
        return text if more <= 0 else f"{text[:MAX_OUTPUT_CHARACTERS]}... ({more} more characters)"

    def call_many(self, calls: Sequence[ToolCall | BadCall]) -> list[str]:
        """The results of many calls, in their order; sandboxes run side by side, one for each core."""
        if len(calls) < 2:
            return [self.call(call) for call in calls]
        with ThreadPoolExecutor(min(num_cpus(), len(calls))) as threads:
            return list(threads.map(self.call, calls))

    def _result(self, call: ToolCall | BadCall) -> str:
        if isinstance(call, BadCall):
            raise ToolError(f"the call cannot be read: {call.reason}")
        if call.name not in self.tools:
            raise ToolError(f"there is no tool {call.name[:60]!r}; there are {', '.join(self.tools)}")
        tool = self.tools[call.name]
        wrong = argument_error(tool.parameters, call.arguments)
        if wrong is not None:
            raise ToolError(f"wrong arguments: {wrong}")
        return tool.call(call.arguments)


def listed_tools(settings: ToolsConfig) -> list[dict[str, Any]]:
    """What prompts say of the tools, in the form chat templates take; nothing where they are not to be listed."""
    if not (settings.names and settings.listed):
        return []
    with ToolBox(settings) as box:
        return box.specs
