"""Reporters by name: built in, registered by a decorator, or brought by an installed package's entry point.

The JSON report is what `eval` reads back to compare; lines of answers are for other programs. The page has its own
file.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.evaluation.outcome import Report
from ray_pipeline.isolation.function_name import entry_points
from ray_pipeline.records.artifacts import write_json, write_text

ENTRY_POINTS = "ray_pipeline.reporters"
Reporter = Callable[[Report, Path], None]
_REPORTERS: dict[str, Reporter] = {}
_BUILTIN = ("page",)


def reporter(name: str) -> Callable[[Reporter], Reporter]:
    """Register a function that writes a `Report` to a path; `eval --report NAME=PATH` calls it.

    A package brings reporters by an entry point in the group "ray_pipeline.reporters" that names such a function.
    """

    def register(write: Reporter) -> Reporter:
        _REPORTERS[name] = write
        return write

    return register


@functools.cache
def _load() -> None:
    for module in _BUILTIN:
        importlib.import_module(f"ray_pipeline.report.evaluation.{module}")
    for name, found in entry_points(ENTRY_POINTS):
        if callable(found) and name not in _REPORTERS:  # its module may have registered it by the decorator
            reporter(name)(found)


def known_reporters() -> tuple[str, ...]:
    """All names, in alphabetical order."""
    _load()
    return tuple(sorted(_REPORTERS))


def get_reporter(name: str) -> Reporter:
    """The reporter of that name.

    Raises:
        UserError: naming those there are.
    """
    known = known_reporters()
    if name not in known:
        raise UserError(
            f'--report: no reporter is called "{name}"{did_you_mean(name, known)}. Known: {", ".join(known)}.'
        )
    return _REPORTERS[name]


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
