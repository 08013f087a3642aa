"""Functions to write, run against their tests in a sandbox: HumanEval (arXiv:2107.03374), and our own."""

from __future__ import annotations

from random import Random

from ray_pipeline.data.files.fields import Record
from ray_pipeline.data.tasks.mixes import DIFFICULTIES
from ray_pipeline.evaluation.graders import TestScoring
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.generators import programs
from ray_pipeline.evaluation.tasks.item import Item, Request, Task
from ray_pipeline.evaluation.tasks.record_tasks import read_items, text_field
from ray_pipeline.evaluation.tasks.suites import MAX_DRAWS, QUESTIONS
from ray_pipeline.isolation.sandbox import check_sandbox

HUMANEVAL = "openai/openai_humaneval:test"
ASK = "Complete this Python function. Put the whole function into a ```python block.\n```python\n{}\n```"


@task("humaneval", takes="PATH")
def humaneval(request: Request) -> Task:
    """HumanEval: Python functions to complete, run against their tests in a sandbox."""
    without_landlock = not request.needs_landlock
    check_sandbox(without_landlock=without_landlock)

    def convert(record: Record, index: int) -> Item:
        prompt, name = text_field(record, "prompt"), text_field(record, "entry_point")
        tests = f"{text_field(record, 'test')}\ncheck({name})"
        solution = record.get("canonical_solution")
        return Item(
            str(record.get("task_id", index)),
            ASK.format(prompt.rstrip()),
            solution if isinstance(solution, str) else "",
            "humaneval",
            data={"tests": tests, "before": prompt, "name": name},
        )

    items = read_items("humaneval", request.argument or HUMANEVAL, convert)
    return Task("humaneval", items, TestScoring(without_landlock=without_landlock), votes=False)


@task("programming_functions")
def programming_functions(request: Request) -> Task:
    """Python functions to write, run against their tests in a sandbox."""
    without_landlock = not request.needs_landlock
    check_sandbox(without_landlock=without_landlock)
    wanted = request.limit or QUESTIONS
    levels = [level for level in request.difficulties or DIFFICULTIES if level in DIFFICULTIES]
    items: list[Item] = []
    seen: set[str] = set()
    for number in range(MAX_DRAWS * wanted if levels else 0):
        if len(items) == wanted:
            break
        level = levels[number % len(levels)]
        made = programs.exercise(Random(f"{request.seed}/eval/functions/{number}"), level)
        if made.prompt not in seen:
            seen.add(made.prompt)
            prompt = f"{made.prompt} Put the code into a ```python block."
            data = {"tests": made.tests}
            items.append(Item(str(number), prompt, made.solution, programs.EXERCISES[level - 1], level, data=data))
    return Task("programming_functions", items, TestScoring(without_landlock=without_landlock), votes=False)
