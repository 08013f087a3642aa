"""Does the program in the answer pass its tests? It runs in a sandbox; what hangs or crashes there is wrong.

The tests run in another process than the program (`isolation.judge`), which sees nothing of them but its calls.

References, as text or JSON: Python that raises where the program is wrong (`assert add(1, 2) == 3`); {"tests": such
Python, or a list of it}; what a whole program reads and prints, [{"input": ..., "output": ...}, ...] or
{"inputs": [...], "outputs": [...]}.
"""

from __future__ import annotations

import re
import time
from typing import Any

from ray_pipeline.isolation.sandbox import run_judged, run_python
from ray_pipeline.rewards.answer import final_text
from ray_pipeline.rewards.registry import reward
from ray_pipeline.tools.calls import read_json

MEMORY_BYTES = 512 << 20
_BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code_block(text: str) -> str | None:
    """The program in an answer: its last ```python block, which may be cut off; None without one."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _not_written(reference: str) -> None:
    """Tests do not tell the program: the self-test goes by a question's own "completion"."""
    del reference


@reward("code", judges=True, demonstrate=_not_written)
def unit_tests(
    prompt: str, completion: str, reference: str, *, timeout_seconds: float = 8.0, without_landlock: bool = False
) -> float:
    """1.0 where the completion's program passes all tests, else 0.0.

    Args:
        prompt: not looked at. timeout_seconds: for all tests together. without_landlock: see `sandbox.run_python`.
    Raises:
        ValueError: the reference holds no tests.
        UserError: this machine has no sandbox.
    """
    del prompt
    tests = read_tests(reference)
    solution = code_block(final_text(completion) or "")
    if solution is None:
        return 0.0
    limits: dict[str, Any] = {"memory_bytes": MEMORY_BYTES, "without_landlock": without_landlock}
    if isinstance(tests, str):
        return float(run_judged(solution, tests, seconds=timeout_seconds, **limits))
    deadline = time.monotonic() + timeout_seconds
    return float(all(_prints(solution, given, wanted, deadline, limits) for given, wanted in tests))


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


def _prints(solution: str, given: str, wanted: str, deadline: float, limits: dict[str, Any]) -> bool:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return False
    result = run_python(solution, stdin=given, cpu_seconds=seconds, wall_seconds=seconds, **limits)
    return result.status == "ok" and _lines(result.stdout) == _lines(wanted)


def _lines(text: str) -> list[str]:
    """Lines without the space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
