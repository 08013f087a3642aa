"""Is the final answer mathematically the reference? By math-verify: fractions, sets, intervals, matrices, equations.

Symbolic algebra can take forever on what a model writes. math-verify's own time limits rest on signals, which only a
main thread may set; they are off here, and the process that calls this function is killed instead.
"""

from __future__ import annotations

import importlib.util
import logging

from ray_pipeline.errors import UserError
from ray_pipeline.rewards.answer import final_text
from ray_pipeline.rewards.registry import reward


def check_installed() -> None:
    """Raise UserError unless math-verify can be imported."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError('reward "math": needs math-verify. Run: pip install "math-verify[antlr4_13_2]".')


def prepare_process() -> None:
    """Import sympy and build its parser, which takes seconds, before the first answer's time runs."""
    check_installed()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off, as they should be
    math_answer("", r"\boxed{\frac{1}{2}}", "0.5")


@reward("math", judges=True)
def math_answer(prompt: str, completion: str, reference: str) -> float:
    r"""1.0 where the completion's answer equals the reference's mathematically, else 0.0.

    Args:
        prompt: not looked at. completion: its answer is the last `\boxed{}`, or the last formula or number.
        reference: the answer, with or without `$` around it, or a worked solution that ends with `#### answer`.
    Raises:
        ValueError: the reference is no mathematics that math-verify can read.
    """
    from math_verify import parse, verify

    del prompt
    final = final_text(completion)
    if final is None or not final.strip():
        return 0.0
    expected = reference.rpartition("####")[2].strip()
    gold = parse(_as_formula(expected), parsing_timeout=None) or parse(expected, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the reference {expected[:80]!r} is not mathematics")
    given = parse(final, parsing_timeout=None)
    return float(bool(given) and verify(gold, given, timeout_seconds=None))


def _as_formula(text: str) -> str:
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"
