"""Tasks by name: built in, registered by a decorator, or brought by an installed package's entry point."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.isolation.function_name import entry_points

ENTRY_POINTS = "ray_pipeline.tasks"
# Modules whose import registers the built-in tasks.
_BUILTIN = ("suites", "question_tasks", "choices", "code", "harness")


@dataclass(frozen=True)
class TaskEntry:
    """A registered task.

    Attributes:
        make: the questions for a request. takes: what may stand behind the colon; empty for nothing.
    """

    name: str
    make: Callable[[Request], Task]
    summary: str
    takes: str = ""


_ENTRIES: dict[str, TaskEntry] = {}


def task(name: str, *, takes: str = "") -> Callable[[Callable[[Request], Task]], Callable[[Request], Task]]:
    """Register a function that makes a task under a name; the first line of its docstring is what `--list` shows.

        @task("capitals")
        def capitals(request: Request) -> Task:
            \"\"\"Capitals of countries.\"\"\"
            items = [Item("0", "What is the capital of Peru?", "Lima")]
            return Task("capitals", items, scoring=RewardScoring("exact"))

    A package brings tasks by an entry point in the group "ray_pipeline.tasks" that names such a function.

    Args:
        takes: what may stand behind "name:", for example "PATH"; empty where nothing may.
    """

    def register(make: Callable[[Request], Task]) -> Callable[[Request], Task]:
        summary = (make.__doc__ or "").strip().split("\n")[0]
        _ENTRIES[name] = TaskEntry(name, make, summary, takes)
        return make

    return register


@functools.cache
def _load() -> None:
    """Import everything that registers tasks, once.

    Raises:
        UserError: an installed package's entry point cannot be imported.
    """
    for module in _BUILTIN:
        importlib.import_module(f"ray_pipeline.evaluation.tasks.{module}")
    for name, found in entry_points(ENTRY_POINTS):
        if callable(found) and name not in _ENTRIES:  # its module may have registered it by the decorator
            task(name)(found)


def known_tasks() -> dict[str, TaskEntry]:
    """All tasks by name, in alphabetical order."""
    _load()
    return dict(sorted(_ENTRIES.items()))


def make_task(given: str, request: Request) -> Task:
    """The task that `NAME` or `NAME:ARGUMENT` means, at most `request.limit` of its questions.

    Raises:
        UserError: no such task, an argument too many or too few, unreadable files, or no question left.
    """
    name, _, argument = given.partition(":")
    entries = known_tasks()
    if name not in entries:
        known = ", ".join(f"{e.name}:{e.takes}" if e.takes else e.name for e in entries.values())
        raise UserError(f'--tasks {given}: no task is called "{name}"{did_you_mean(name, entries)}. Known: {known}.')
    entry = entries[name]
    if argument and not entry.takes:
        raise UserError(f'--tasks {given}: the task "{name}" takes nothing behind a colon. Write {name}.')
    made = entry.make(replace(request, argument=argument or None))
    return replace(made, name=given, items=_selected(given, made, request))


def _selected(given: str, made: Task, request: Request) -> list[Item]:
    items = made.items
    if made.way == "harness":
        if request.difficulties is not None:
            raise UserError(f"--difficulty: the questions of {given} have no difficulty. Leave it out.")
        return items
    if request.difficulties is not None:
        items = [item for item in items if item.difficulty in request.difficulties]
        if not items:
            there = sorted({item.difficulty for item in made.items})
            levels = "have no difficulty" if there == [0] else f"are of difficulty {', '.join(map(str, there))}"
            raise UserError(f"--difficulty: the questions of {given} {levels}. Choose others, or omit it.")
    items = items[: request.limit]
    if not items:
        raise UserError(f"--tasks {given}: holds no questions. Give another source.")
    if len({item.id for item in items}) < len(items):
        doubled = next(a.id for i, a in enumerate(items) if any(a.id == b.id for b in items[:i]))
        raise UserError(f'--tasks {given}: two questions have the id "{doubled}". Ids must differ.')
    return items


def make_tasks(names: Sequence[str], request: Request) -> list[Task]:
    """Every task asked for, in order.

    Raises:
        UserError: none, one twice, or what `make_task` refuses.
    """
    if not names:
        raise UserError("--tasks: name at least one task, for example --tasks arithmetic,logic; --list shows them.")
    doubled = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if doubled is not None:
        raise UserError(f"--tasks: {doubled} is named twice. Name every task once.")
    return [make_task(name, request) for name in names]
