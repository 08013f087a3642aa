"""Runs side by side."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record, read_status
from ray_pipeline.evaluation.statistics import paired_test
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.report.comparison import compare_runs, different
from ray_pipeline.report.comparison_views import print_comparison, render_comparison

FIRST = {"run_name": "a", "seed": 0, "grpo": {"beta": 0.1, "rewards": {"answer": 1}}, "stages": ["sft"]}
SECOND = {"run_name": "b", "seed": 0, "grpo": {"beta": 0.2, "rewards": {"<b>": 1}}, "stages": ["sft"]}


def make(run_dir: Path, right: set[int], questions: range) -> dict:
    """A run whose SFT answered some of its questions."""
    run, folder = RunFile(run_dir), run_dir / "sft-a"
    run.chain, run.stages = ["sft"], {"sft": {"identity": "a", "folder": folder.name, "decides": {}}}
    run_dir.mkdir()
    run.save()
    accuracy = len(right) / len(questions)
    record = begin_record(folder, Record("sft", "a", "running"))
    close_record(folder, record, "done", metrics={"accuracy": accuracy}, baselines={"input_accuracy": 0.0})
    marks = [[f"question {i}", float(i in right)] for i in questions]
    figures = {"questions": len(questions), "accuracy": accuracy, "interval": [0.25, 0.75]}
    write_sealed(folder / "heldout.json", figures | {"marks": marks})
    return read_status(run_dir)


def test_settings_that_differ_stand_by_their_dotted_names():
    assert different([FIRST, SECOND]) == {
        "grpo.beta": ["0.1", "0.2"],
        "grpo.rewards.answer": ["1", "–"],
        "grpo.rewards.<b>": ["–", "1"],
    }
    assert different([FIRST, FIRST | {"run_name": "c"}]) == {}


def test_runs_are_tested_on_the_questions_that_both_answered(tmp_path):
    first = make(tmp_path / "first", {0, 1}, range(12))
    second = make(tmp_path / "second", {1, 2, 3, 4, 5, 6, 7, 8, 11}, range(1, 13))
    other = make(tmp_path / "other", {90}, range(80, 92))
    comparison = compare_runs([first, second, other], [FIRST, SECOND, FIRST])
    [row] = comparison.stages
    shared = range(1, 12)
    marks = [float(i in {1, 2, 3, 4, 5, 6, 7, 8, 11}) for i in shared], [float(i == 1) for i in shared]
    assert row.tests == [paired_test(*marks), "no held-out question is the same"]
    assert row.cells[0].interval == "25.0% to 75.0%" and row.cells[1].figure == "held-out accuracy 75.0%"
    out = io.StringIO()
    print_comparison(Console(file=out, width=150), comparison)
    assert "sft, second against first: better: +72.7 points" in out.getvalue()
    page = render_comparison(comparison)
    assert "better on 8 and worse on 0 of 11" in page and "grpo.rewards.&lt;b&gt;" in page
