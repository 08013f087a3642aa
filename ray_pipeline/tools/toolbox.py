"""The tools of a run: calls of a model carried out."""

from __future__ import annotations

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
ERROR = "Error: "  # how the text of a call that gave nothing begins


class ToolBox:
    """Carries out calls. What goes wrong is told to the model as text."""

    def __init__(self, settings: ToolsConfig):
        """
        Raises:
            UserError: an unknown tool.
        """
        seconds, without_landlock = settings.timeout_seconds, settings.without_landlock
        made = [get_tool(n, timeout_seconds=seconds, without_landlock=without_landlock) for n in settings.names]
        self.tools: dict[str, Tool] = {tool.name: tool for tool in made}

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
        try:
            text = self._result(call)
        except ToolError as error:
            text = f"{ERROR}{error}"
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
