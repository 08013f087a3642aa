"""Questions drawn from reasoning-gym's generators (arXiv:2505.24760), for GRPO and evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ray_pipeline.data.shared.cleaning import content_hash
from ray_pipeline.data.tasks.question import Question
from ray_pipeline.errors import UserError, did_you_mean

GYM = "reasoning_gym"
_NAME = re.compile(rf"{GYM}:(?P<task>[^:]*)(?::(?P<size>[^:]*))?")


def parse_gym_name(given: str) -> tuple[str, int | None] | None:
    """(task, size) of `reasoning_gym:TASK[:size]`; None for another kind of name.

    Raises:
        UserError: the size is not a number of questions.
    """
    match = _NAME.fullmatch(given)
    if match is None:
        return None
    size = match["size"]
    if size is not None and not (size.isascii() and size.isdigit() and int(size) >= 2):
        raise UserError(f'"{given}": the size must be a number of questions, at least 2, not "{size}".')
    return match["task"], None if size is None else int(size)


def check_task(task: str) -> None:
    """Raise UserError unless reasoning-gym is installed, has the task and can draw it without further settings."""
    _dataset(task, seed=0, size=1)


def gym_questions(task: str, size: int, seed: int) -> Iterator[Question]:
    """The first `size` questions of a task, a pure function of its arguments.

    The answer of each is what the task's own scoring needs: its entry (question, answer, metadata) as JSON.

    Raises:
        UserError: no such task.
    """
    for entry in gym_entries(task, size, seed):
        yield Question(entry["question"].strip(), "", entry_text(entry), task, 0)


def gym_entries(task: str, size: int, seed: int) -> Iterable[dict[str, Any]]:
    """The first `size` entries of a task as reasoning-gym has them: question, answer, metadata.

    Raises:
        UserError: no such task.
    """
    # Entry i is made from seed + i, so neighbouring seeds would share nearly all of their questions.
    return _dataset(task, int(content_hash(f"{seed}/{task}")[:8], 16), size)


def entry_text(entry: dict[str, Any]) -> str:
    """An entry as the reference that the task's own scoring reads: JSON."""
    return json.dumps(entry, default=_plain, sort_keys=True)


def _dataset(task: str, seed: int, size: int) -> Iterable[dict[str, Any]]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(f'"{GYM}:{task}": reasoning-gym is not installed. Use pip install reasoning-gym.') from None
    if task not in DATASETS:
        raise UserError(
            f'"{GYM}:{task}": reasoning-gym has no task "{task}"{did_you_mean(task, DATASETS)}. It has '
            f"{', '.join(sorted(DATASETS))}."
        )
    try:
        dataset: Iterable[dict[str, Any]] = create_dataset(task, seed=seed, size=size)
    except (AssertionError, ImportError, OSError, TypeError, ValueError) as error:
        raise UserError(f'"{GYM}:{task}": cannot be drawn as it is ({error}). Use another task.') from None
    return dataset


def _plain(value: Any) -> Any:
    """What JSON does not know, in the nearest form it does: numbers of other libraries, sets, and texts of the rest."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
