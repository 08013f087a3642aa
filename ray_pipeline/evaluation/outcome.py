"""An evaluation as one value: which model was asked what and how, its results, and a comparison with another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError
from ray_pipeline.evaluation.results import ItemResult, TaskResult
from ray_pipeline.evaluation.statistics import PairedTest, paired_test
from ray_pipeline.evaluation.tasks.item import Item, Task
from ray_pipeline.records.artifacts import read_json

SCHEMA = 1
KIND = "ray_pipeline.evaluation"


@dataclass
class Report:
    """An evaluation.

    Attributes:
        model: name, folder, form and size of the model that was asked. settings: how it was asked.
        other: what it was compared with, another report. created: Unix seconds.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    tasks: list[TaskResult]
    created: float
    other: Report | None = None
    comparison: dict[str, PairedTest] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The stable form that `read_report` reads back."""
        out: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "created": self.created,
            "model": self.model,
            "settings": self.settings,
            "tasks": [task.as_json() for task in self.tasks],
        }
        if self.other is not None:
            tests = {name: test.as_json() for name, test in self.comparison.items()}
            out["comparison"] = {"model": self.other.model, "settings": self.other.settings, "tasks": tests}
        return out

    def compare(self, other: Report) -> None:
        """Add a paired test with another report, task by task and over all of them.

        Raises:
            UserError: the two do not answer the same questions.
        """
        both: tuple[list[float], list[float]] = ([], [])
        for task in self.tasks:
            items = counterpart(task.name, other).items
            check_same_questions(task.name, task.items, items)
            if task.items:
                pair = [item.share for item in task.items], [item.share for item in items]
                self.comparison[task.name] = paired_test(*pair)
                both[0].extend(pair[0])
                both[1].extend(pair[1])
        if len(self.comparison) > 1:
            self.comparison["all tasks"] = paired_test(*both)
        self.other = other


def check_same_questions(name: str, ours: Sequence[Item | ItemResult], theirs: Sequence[Item | ItemResult]) -> None:
    """Refuse two lists of questions that are not the same, question by question.

    Raises:
        UserError: naming the first difference.
    """
    way_out = "Ask both models the same: equal --tasks, --limit, --seed and --difficulty."
    if len(ours) != len(theirs):
        raise UserError(f"--compare: {name} has {len(ours)} questions here and {len(theirs)} there. {way_out}")
    for mine, other in zip(ours, theirs, strict=True):
        if (mine.id, mine.prompt, mine.reference) != (other.id, other.prompt, other.reference):
            raise UserError(
                f'--compare: {name} differs at question "{mine.id}": {mine.prompt[:60]!r} here, {other.prompt[:60]!r} '
                f"there. {way_out}"
            )


def check_comparable(tasks: Sequence[Task], other: Report) -> None:
    """Refuse a report that does not answer these tasks' questions, before a model is loaded.

    Raises:
        UserError: naming the first difference.
    """
    for task in tasks:
        theirs = counterpart(task.name, other)
        if task.way != "harness":
            check_same_questions(task.name, task.items, theirs.items)


def counterpart(name: str, other: Report) -> TaskResult:
    """The other report's task of that name; files may lie elsewhere there, since the questions are held side by side.

    Raises:
        UserError: it has none, or several that could be meant.
    """
    same = [task for task in other.tasks if task.name == name]
    kind = [task for task in other.tasks if task.name.partition(":")[0] == name.partition(":")[0]]
    found = same or (kind if ":" in name or any(":" in task.name for task in kind) else [])
    if len(found) != 1:
        raise UserError(
            f"--compare: {other.model['name']} was not asked {name}, only {', '.join(t.name for t in other.tasks)}. "
            "Compare on tasks that both have: --tasks names them."
        )
    return found[0]


def is_report(path: Path) -> bool:
    """Whether a path is meant as a report: a file that ends in .json."""
    return path.suffix == ".json" and path.is_file()


def read_report(path: Path) -> Report:
    """A report that `--json` wrote.

    Raises:
        UserError: unreadable, of another kind, or of a newer form.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise UserError(f"{path}: is not a report of `eval`. Give a file that `eval --json` wrote.")
    if values.get("schema") != SCHEMA:
        raise UserError(f"{path}: has schema {values.get('schema')}, but this version reads {SCHEMA}. Evaluate again.")
    try:
        tasks = [TaskResult.from_json(task) for task in values["tasks"]]
        return Report(values["model"], values["settings"], tasks, values["created"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}). Evaluate again.") from None
