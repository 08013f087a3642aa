"""The tool `python`: a program of the model's in a sandbox, which starts anew with every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_pipeline.isolation.sandbox import run_python
from ray_pipeline.tools.tool import ToolError

MEMORY_BYTES = 512 << 20

# As a prompt does, it prints the value of an expression in the last line.
_SESSION = """\
import ast
def run(code):
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    space = {{"__name__": "__main__"}}
    exec(compile(tree, "<code>", "exec"), space)
    value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space) if last else None
    if value is not None:
        print(value)
run({code!r})
"""
_REASONS = {
    "timeout": "took longer than {seconds:g} seconds",
    "memory": "needed too much memory",
    "output": "printed too much",
    "disk": "wrote too much",
    "threads": "started too many threads",
    "killed": "crashed",
}


class Python:
    """The tool `python`."""

    name = "python"
    description = "Runs a Python program and returns what it prints. Nothing is kept from one call to the next."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "the program"}},
        "required": ["code"],
    }

    def __init__(self, timeout_seconds: float, without_landlock: bool = False):
        self.timeout_seconds, self.without_landlock = timeout_seconds, without_landlock

    def call(self, arguments: Mapping[str, Any]) -> str:
        """What the program printed.

        Raises:
            ToolError: it raised, or was stopped.
            UserError: this machine has no sandbox.
        """
        result = run_python(
            _SESSION.format(code=arguments["code"]),
            cpu_seconds=self.timeout_seconds,
            wall_seconds=self.timeout_seconds,
            memory_bytes=MEMORY_BYTES,
            without_landlock=self.without_landlock,
        )
        if result.status == "ok":
            return result.stdout.rstrip("\n")
        last = result.stderr.rstrip().rpartition("\n")[2] or f"exit code {result.exit_code}"
        raise ToolError(_REASONS.get(result.status, last).format(seconds=self.timeout_seconds))
