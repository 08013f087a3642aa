"""What a model can be asked: tasks by name. Importing this package makes no questions and reads no files."""

from __future__ import annotations

from ray_pipeline.evaluation.tasks.catalog import TaskEntry, known_tasks, make_task, make_tasks, task
from ray_pipeline.evaluation.tasks.item import Item, Request, Task

__all__ = ["Item", "Request", "Task", "TaskEntry", "known_tasks", "make_task", "make_tasks", "task"]
