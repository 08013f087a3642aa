"""reasoning-gym's tasks: generated from the seed, marked by the task's own verifier."""

from __future__ import annotations

from typing import Any

from ray_pipeline.data.tasks.reasoning_gym_source import entry_text, gym_entries
from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.graders import RewardScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.item import Item, Request, Task

QUESTIONS = 100


@task("reasoning_gym", takes="TASK")
def reasoning_gym(request: Request) -> Task:
    """A task of reasoning-gym by name, such as reasoning_gym:countdown."""
    name = request.argument
    if name is None:
        raise UserError("--tasks reasoning_gym: name one of its tasks, for example reasoning_gym:countdown.")
    try:
        entries = gym_entries(name, request.limit or QUESTIONS, request.seed)
    except UserError as error:
        raise UserError(f"--tasks {error}") from None
    items = [_item(str(i), name, entry) for i, entry in enumerate(entries)]
    return Task("reasoning_gym", items, RewardScoring(f"reasoning_gym:{name}"))


def _item(id: str, name: str, entry: dict[str, Any]) -> Item:
    # The verifier reads the whole entry, as a JSON text; people read its answer.
    return Item(id, str(entry["question"]), str(entry["answer"]), name, data={"reference": entry_text(entry)})
