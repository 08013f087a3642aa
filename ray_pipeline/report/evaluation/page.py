"""The report as one page that needs no other file, in the style of a run's (`templates/evaluation.html`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.evaluation.results import TaskResult
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.report.evaluation import wording
from ray_pipeline.report.evaluation.formats import reporter
from ray_pipeline.report.page_files import page

MOST_SAMPLES = 8  # right ones, and as many wrong ones, of a task


@reporter("html")
def write_page(report: Report, path: Path) -> None:
    """Write the page whole or not at all."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page."""
    return page(
        "evaluation.html",
        title=f"Evaluation of {report.model['name']}",
        report=report,
        summary=_summary(report),
        tasks=[_task(task) for task in report.tasks],
        most_samples=MOST_SAMPLES,
        wording=wording,
    )


def _summary(report: Report) -> dict[str, Any]:
    """The table of all tasks: `head`, and `rows` with a cell for every figure that any task has."""
    all_figures = [task.figures() for task in report.tasks]
    texts = [wording.sampled_texts(figures) | wording.rate_texts(figures) for figures in all_figures]
    columns = dict.fromkeys(name for row in texts for name in row)
    rows = [
        [task.name, figures["questions"], wording.accuracy_text(figures), *(row.get(name, "") for name in columns)]
        for task, figures, row in zip(report.tasks, all_figures, texts, strict=True)
    ]
    return {"head": ["Task", "Questions", "Accuracy", *(name[:1].upper() + name[1:] for name in columns)], "rows": rows}


def _task(task: TaskResult) -> dict[str, Any]:
    """What the page shows of one task: notes, accuracy by group, right and wrong answers with their questions."""
    figures = task.figures()
    answers = [(item, answer) for item in task.items for answer in item.answers]
    groups = {"Category": figures.get("by_category", {}), "Level": figures.get("by_difficulty", {})}
    return {
        "name": task.name,
        "notes": _notes(figures),
        "groups": {title: found for title, found in groups.items() if len(found) > 1},
        "answers": {
            word: [pair for pair in answers if pair[1].correct == right]
            for word, right in (("right", True), ("wrong", False))
        },
    }


def _notes(figures: Mapping[str, Any]) -> list[str]:
    notes = []
    if figures.get("unmarked"):
        notes.append(f"{figures['unmarked']} answers could not be marked and count as wrong.")
    if figures.get("too_long"):
        notes.append(f"{figures['too_long']} prompts do not fit the context.")
    return notes + [f"{name}: {value:.4g}" for name, value in figures.get("other", {}).items()]
