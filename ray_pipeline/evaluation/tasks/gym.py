"""reasoning-gym's tasks: generated from the seed, marked by the task's own verifier."""

from __future__ import annotations

import json
from typing import Any

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.evaluation.scoring import RewardScoring
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.evaluation.tasks.registry import task

QUESTIONS = 100


@task("reasoning_gym", takes="TASK")
def reasoning_gym(request: Request) -> Task:
    """A task of reasoning-gym by name, such as reasoning_gym:countdown."""
    name = request.argument
    if name is None:
        raise UserError("--tasks reasoning_gym: name one of its tasks, for example reasoning_gym:countdown.")
    try:
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            f"--tasks reasoning_gym:{name}: reasoning-gym is not installed. Install it: pip install reasoning-gym"
        ) from None
    if name not in DATASETS:
        raise UserError(
            f"--tasks reasoning_gym:{name}: reasoning-gym has no such task{did_you_mean(name, DATASETS)}. It has "
            f"{len(DATASETS)}, among them countdown, chain_sum and basic_arithmetic."
        )
    dataset = gym.create_dataset(name, size=request.limit or QUESTIONS, seed=request.seed)
    items = [_item(str(i), name, dataset[i]) for i in range(len(dataset))]
    return Task("reasoning_gym", items, RewardScoring(f"reasoning_gym:{name}"))


def _item(id: str, name: str, entry: dict[str, Any]) -> Item:
    # The verifier reads the whole entry, as a JSON text; people read its answer.
    whole = json.dumps(entry, ensure_ascii=False, default=str)
    return Item(id, str(entry["question"]), str(entry["answer"]), name, data={"reference": whole})
