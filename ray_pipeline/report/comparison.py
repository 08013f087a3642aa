"""Runs side by side: settings that differ, each stage's figures, and what the same held-out questions allow to be said.

Plain data in, plain data out; the first run is what the others are held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_pipeline.evaluation.statistics import PairedTest, paired_test
from ray_pipeline.records.units import percent, seconds_text
from ray_pipeline.report.run_facts import heldout
from ray_pipeline.report.summary import summary_rows
from ray_pipeline.settings.layers import flat

SAME_EVERYWHERE = ("run_name", "output_dir")  # settings that name a run, and are no difference of it
LEAST_QUESTIONS = 1  # that two runs must share to be compared


@dataclass(frozen=True)
class Cell:
    """What one run reached in one stage. interval: of its held-out accuracy; empty where that was not measured."""

    status: str
    figure: str = ""
    interval: str = ""
    time: str = ""
    digest: str = ""


@dataclass(frozen=True)
class StageRow:
    """One stage of all runs. tests: of each run but the first, against the first; a text says why there is none."""

    stage: str
    cells: list[Cell]
    tests: list[PairedTest | str]


@dataclass(frozen=True)
class Comparison:
    """names: of the runs. settings: dotted key -> each run's value as text, of those that differ."""

    names: list[str]
    settings: dict[str, list[str]]
    stages: list[StageRow]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": "ray_pipeline.comparison",
            "schema": 1,
            "runs": self.names,
            "settings": self.settings,
            "stages": [
                {
                    "stage": row.stage,
                    "runs": [vars(cell) for cell in row.cells],
                    "tests": [test if isinstance(test, str) else test.as_json() for test in row.tests],
                }
                for row in self.stages
            ],
        }


def compare_runs(statuses: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> Comparison:
    """Hold runs side by side.

    Args:
        statuses: `ledger.read_status`'s answers. settings: the runs' settings, nested.
    """
    entries = [{entry["stage"]: entry for entry in status["stages"]} for status in statuses]
    order = list(dict.fromkeys(stage for found in entries for stage in found))
    return Comparison(
        [status["run"] for status in statuses],
        different(settings),
        [_row(stage, [found.get(stage) for found in entries]) for stage in order],
    )


def different(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings whose values are not the same in all runs, by dotted name; `–` where a run has no such setting."""
    dotted = [flat(dict(each)) for each in settings]
    names = dict.fromkeys(name for each in dotted for name in each)
    rows = {name: [str(each.get(name, "–")) for each in dotted] for name in names if name not in SAME_EVERYWHERE}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _row(stage: str, entries: Sequence[Mapping[str, Any] | None]) -> StageRow:
    answers = [heldout(Path(entry["folder"])) if entry and "folder" in entry else None for entry in entries]
    cells = [_cell(entry, found) for entry, found in zip(entries, answers, strict=True)]
    asked = any(found is not None for found in answers)
    tests = [_test(answers[0], other) for other in answers[1:]] if asked else []
    return StageRow(stage, cells, tests)


def _cell(entry: Mapping[str, Any] | None, answers: Mapping[str, Any] | None) -> Cell:
    if entry is None:
        return Cell("no such stage")
    [row] = summary_rows([entry])
    interval = ""
    if answers is not None and row.figure:
        low, high = answers["interval"]
        interval = f"{percent(low)} to {percent(high)}"
    time = "" if row.seconds is None else seconds_text(row.seconds)
    return Cell(row.status, row.figure, interval, time, (entry.get("weights_digest") or "")[:12])


def _test(first: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> PairedTest | str:
    """The other run against the first, on the questions that both answered."""
    if first is None or other is None:
        return "one of the two has not answered held-out questions here, or was made by an older version"
    marks, theirs = dict(map(tuple, other["marks"])), dict(map(tuple, first["marks"]))
    shared = [digest for digest in marks if digest in theirs]
    if len(shared) < LEAST_QUESTIONS:
        return "no held-out question is the same"
    return paired_test([marks[digest] for digest in shared], [theirs[digest] for digest in shared])
