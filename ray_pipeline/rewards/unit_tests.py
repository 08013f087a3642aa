"""Does the program in the answer pass its tests? It runs in a sandbox; what hangs or crashes there is wrong.

References, as text or JSON: Python that raises where the program is wrong (`assert add(1, 2) == 3`); {"tests": such
Python, or a list of it}; what a whole program reads and prints, [{"input": ..., "output": ...}, ...] or
{"inputs": [...], "outputs": [...]}.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from ray_pipeline.rewards.answer import final_text
from ray_pipeline.rewards.registry import reward
from ray_pipeline.sandbox import run_python
from ray_pipeline.tools.calls import read_json

MEMORY_BYTES = 512 << 20
_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

# Two compilations: an open bracket in the program must not swallow the tests. The token behind the tests proves that
# they were reached: a program that exits, or kills itself, has passed nothing.
_HARNESS = """\
import os
def run(write, token):
    space = {{"__name__": "solution"}}
    exec(compile({solution!r}, "<solution>", "exec"), space)
    exec(compile({tests!r}, "<tests>", "exec"), space)
    write(1, token)
run(os.write, {token!r})
"""


def code_block(text: str) -> str | None:
    """The program in an answer: its last ```python block, which may be cut off; None without one."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _not_written(reference: str) -> None:
    """Tests do not tell the program: the self-test goes by a question's own "completion"."""
    del reference


@reward("code", judges=True, demonstrate=_not_written)
def unit_tests(prompt: str, completion: str, reference: str, *, timeout_seconds: float = 8.0) -> float:
    """1.0 where the completion's program passes all tests, else 0.0.

    Args:
        prompt: not looked at. timeout_seconds: for all tests together.
    Raises:
        ValueError: the reference holds no tests.
        UserError: this machine has no sandbox.
    """
    del prompt
    tests = read_tests(reference)
    solution = code_block(final_text(completion) or "")
    if solution is None:
        return 0.0
    if isinstance(tests, str):
        return float(passes(solution, tests, timeout_seconds))
    deadline = time.monotonic() + timeout_seconds
    return float(all(_prints(solution, given, wanted, deadline) for given, wanted in tests))


def read_tests(reference: str) -> str | list[tuple[str, str]]:
    """The tests as Python, or as what a program reads and prints.

    Raises:
        ValueError: neither.
    """
    found = read_json(reference)
    if isinstance(found, dict) and "tests" in found:
        found = found["tests"]
    pairs = _pairs(found)
    if pairs:
        return pairs
    if isinstance(found, list) and found and all(isinstance(part, str) for part in found):
        found = "\n".join(found)
    source = found if isinstance(found, str) else reference if found is None else ""
    try:
        compile(source, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the reference's tests are not Python: {error}") from None
    if not source.strip():
        raise ValueError(f"the reference holds no tests: {reference[:80]!r}")
    return source


def _pairs(found: Any) -> list[tuple[str, str]] | None:
    if isinstance(found, dict) and {"inputs", "outputs"} <= found.keys():
        pairs = list(zip(found["inputs"], found["outputs"], strict=True))
    elif isinstance(found, list) and all(isinstance(t, dict) and {"input", "output"} <= t.keys() for t in found):
        pairs = [(test["input"], test["output"]) for test in found]
    else:
        return None
    return [(_text(given), _text(wanted)) for given, wanted in pairs]


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def passes(solution: str, tests: str, seconds: float) -> bool:
    """Whether the tests, Python that raises where the program is wrong, reach their end behind it in a sandbox.

    Raises:
        UserError: this machine has no sandbox.
    """
    token = secrets.token_hex(16).encode()
    source = _HARNESS.format(solution=solution, tests=tests, token=token)
    result = run_python(source, cpu_seconds=seconds, wall_seconds=seconds, memory_bytes=MEMORY_BYTES)
    return result.status == "ok" and token.decode() in result.stdout


def _prints(solution: str, given: str, wanted: str, deadline: float) -> bool:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return False
    result = run_python(solution, stdin=given, cpu_seconds=seconds, wall_seconds=seconds, memory_bytes=MEMORY_BYTES)
    return result.status == "ok" and _lines(result.stdout) == _lines(wanted)


def _lines(text: str) -> list[str]:
    """Lines without the space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
