"""An evaluation says how far it is: a live line on a terminal, plain ones now and then elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from ray_pipeline.cli.eval_progress import AskProgress
from ray_pipeline.report import progress_lines


def test_plain_lines_have_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now)
    out = StringIO()
    with AskProgress("toy", Console(file=out, width=120)) as progress:
        progress.say("loading")
        progress.start("logic", 200)
        now += 1
        progress.add(10, 500)
        now += 1
        progress.add(10, 500)  # too soon for a line
        now += 18
        progress.add(30, 1000)
        progress.start("lm_eval:x", 0)
        now += 20
        progress.add(10, 0)
    assert out.getvalue().splitlines() == [
        "toy: loading",
        "toy: logic",
        "toy: logic 10/200, 19 s left, 500 tokens/s",
        "toy: logic 50/200, 1 min 00 s left, 100 tokens/s",
        "toy: lm_eval:x",
        "toy: lm_eval:x 10, 0.5 questions/s",
    ]


def test_a_terminal_has_one_line_for_the_task_at_work() -> None:
    out = StringIO()
    with AskProgress("toy", Console(file=out, width=120, force_terminal=True)) as progress:
        progress.start("logic", 4)
        progress.add(1, 10)
        progress.start("algebra [x]", 4)
        progress.add(3, 10)
    last = out.getvalue().rpartition("toy")[2]
    assert "━" in last and "algebra [x] 3/4" in last and "logic" not in last
