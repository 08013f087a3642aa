"""The report as JSON, which `eval` reads back to compare, and as lines of answers to read with other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.records.artifacts import write_json, write_text
from ray_pipeline.report.evaluation.formats import reporter


@reporter("json")
def write_json_report(report: Report, path: Path) -> None:
    """Everything, atomically."""
    write_json(path, report.as_json())


@reporter("jsonl")
def write_answers(report: Report, path: Path) -> None:
    """One line per answer: the question, what was answered, and its mark."""
    lines = []
    for task in report.tasks:
        for item in task.items:
            question = {k: v for k, v in asdict(item).items() if k != "answers"}
            for number, answer in enumerate(item.answers):
                line = {"task": task.name, **question, "sample": number, **asdict(answer)}
                lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))
