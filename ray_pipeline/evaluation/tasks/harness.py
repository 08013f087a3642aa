"""Tasks of lm-evaluation-harness by name, or of a YAML file in its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_pipeline.errors import UserError, did_you_mean, first_line
from ray_pipeline.evaluation.tasks.catalog import task
from ray_pipeline.evaluation.tasks.item import Request, Task


@task("lm_eval", takes="TASK|FILE.yaml")
def lm_eval(request: Request) -> Task:
    """A task of lm-evaluation-harness by name, or a YAML file in its form."""
    name = request.argument
    if name is None:
        raise UserError("--tasks lm_eval: name one of its tasks, for example lm_eval:arc_easy, or a YAML file.")
    is_file = Path(name).suffix in (".yaml", ".yml")
    if is_file and not Path(name).is_file():
        raise UserError(f"--tasks lm_eval:{name}: no such file. Give the path of a task's YAML file.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"--tasks lm_eval:{name}: lm-eval is not installed. Install it: pip install lm-eval") from None
    from ray_pipeline.evaluation.lm_harness import HarnessTask

    manager: Any = TaskManager(include_defaults=not is_file)
    if not is_file and name not in manager.all_tasks:
        raise UserError(
            f"--tasks lm_eval:{name}: lm-eval has no such task{did_you_mean(name, manager.all_tasks)}. "
            "`lm-eval ls tasks` lists them."
        )
    try:
        tasks = manager.load(name)["tasks"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--tasks lm_eval:{name}: it cannot be prepared ({first_line(error):.200}). Its data may be out of reach: "
            "set HF_ENDPOINT to a reachable mirror or HF_HOME to a cache that holds it, or fix its YAML file."
        ) from None
    return Task(f"lm_eval:{name}", [], way="harness", harness=HarnessTask(name, manager, tasks, request.limit))
