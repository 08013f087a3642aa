"""Scores of reasoning-gym's tasks (arXiv:2505.24760): "reasoning_gym:countdown" is the scorer of its task countdown.

Many tasks have more than one right answer, and need the question's data to tell. So a reference is the task's entry as
JSON, as DATA_PREP writes it; a reference of plain text is taken for the task's own answer.
"""

from __future__ import annotations

import functools
from typing import Any

from ray_pipeline.rewards.answer import final_text
from ray_pipeline.tools.calls import read_json

# They compare boards with tuples, which JSON gives back as lists.
_WITH_TUPLES = ("arc_agi", "rearc")


@functools.lru_cache(maxsize=8)
def _task(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, size=1)


def prepare_process() -> None:
    """Import the tasks, which takes seconds, before the first answer's time runs."""
    import reasoning_gym

    del reasoning_gym


def read_reference(prompt: str, reference: str) -> dict[str, Any]:
    """The entry that a reference holds; a plain text is the answer of an entry without data."""
    found = read_json(reference)
    if isinstance(found, dict) and {"answer", "metadata"} <= found.keys():
        return {"question": prompt, **found}
    return {"question": prompt, "answer": reference, "metadata": {}}


def task_of(reference: str) -> str | None:
    """The task whose entry a reference is; None for a plain text."""
    if not reference.startswith("{"):
        return None
    metadata = read_reference("", reference)["metadata"]
    return metadata.get("source_dataset") if isinstance(metadata, dict) else None


def oracle(reference: str) -> str | None:
    """The answer that the task itself gives, None where it gives none."""
    answer = read_reference("", reference)["answer"]
    return answer if isinstance(answer, str) else None


def gym_score(task: str, prompt: str, completion: str, reference: str) -> float:
    """The task's own score of what follows the thinking, 0.0 to 1.0; 0.0 where nothing is answered.

    Raises:
        KeyError: the task needs data that the reference does not hold.
    """
    final = final_text(completion)
    if final is None or not final.strip():
        return 0.0
    entry = read_reference(prompt, reference)
    if task in _WITH_TUPLES:
        entry["metadata"] = {key: _tupled(value) for key, value in entry["metadata"].items()}
    return float(_task(task).score_answer(final.strip(), entry))


def _tupled(value: Any) -> Any:
    return tuple(_tupled(inner) for inner in value) if isinstance(value, list) else value
