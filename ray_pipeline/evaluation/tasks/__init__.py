"""What a model can be asked: tasks by name. Importing this package makes no questions and reads no files."""

from __future__ import annotations

from ray_pipeline.evaluation.tasks.catalog import (
    Item,
    Request,
    Task,
    TaskEntry,
    known_tasks,
    make_task,
    make_tasks,
    task,
)

__all__ = ["Item", "Request", "Task", "TaskEntry", "known_tasks", "make_task", "make_tasks", "task"]
