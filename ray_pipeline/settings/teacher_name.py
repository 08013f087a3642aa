"""What `distillation.teacher` names: a stage's folder, a model folder, or stored log-probabilities. No torch."""

from __future__ import annotations

from pathlib import Path

TOP_K = "topk:"


def is_top_k(teacher: str | None) -> bool:
    """Whether the name is `topk:PATH`."""
    return teacher is not None and teacher.startswith(TOP_K)


def teacher_path(teacher: str) -> Path:
    """The folder that is read: the model of a stage's folder, else the folder itself."""
    path = Path(teacher.removeprefix(TOP_K))
    return path / "model" if (path / "model" / "config.json").is_file() else path
