"""A run as a dashboard shows it."""

from __future__ import annotations

import math

from ray_pipeline.records.metrics_file import MetricsFile
from ray_pipeline.report.run_view import StageView, heat, sparkline


def test_sparklines_follow_the_values_and_leave_out_what_is_no_number():
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == "" and sparkline([math.nan]) == ""
    assert sparkline([0.0, math.nan, 7.0]) == "▁ █"
    assert len(sparkline([float(i) for i in range(1000)], 60)) == 60


def test_heat_is_blank_without_a_token_and_full_at_twice_the_mean():
    assert heat([0, 10, 20, 10]) == " ▒█▒"
    assert heat([0, 0]) == "  " and len(heat([1.0] * 256)) == 64


def test_a_stage_is_read_as_it_grows_and_steps_taken_again_are_not_doubled(tmp_path):
    view = StageView(tmp_path)
    view.refresh()
    lines = MetricsFile(tmp_path, "sft")
    for step in (1, 2, 3):
        lines.log(step, {"train/loss": 4.0 - step, "memory/rank_0_gb": 1.5, "moe/layers.1/load": [3, 5]})
    view.refresh()
    again = MetricsFile(tmp_path, "sft", resume_step=2)
    again.log(3, {"train/loss": 0.5})
    view.refresh()
    assert view.curves["train/loss"] == [(1, 3.0), (2, 2.0), (3, 0.5)]
    assert view.drawn()[0] == ("loss", [3.0, 2.0, 0.5])
    assert view.memory() == [(0, 1.5)] and view.loads() == [("layers.1", [3, 5])]
