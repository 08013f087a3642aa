"""The report in a real browser: all is drawn, nothing overlaps or scrolls sideways, no error in the console."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.dag.ledger import Record, RunFile, begin_record, close_record, read_status
from ray_pipeline.launch.launchers import InlineLauncher
from ray_pipeline.records.guard_file import add_intervention
from ray_pipeline.report.run_page import write_report
from tests.report.looking import look_at
from tests.serving.browser import browser, page_at
from tests.training.toy_run import arguments, train


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Of a run whose pretraining really took steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    figures = InlineLauncher().run("pretrain", train, arguments(run_dir.parent, log_every=1))
    folder, run = run_dir / "pretrain-0", RunFile(run_dir)
    run.stages["pretrain"] = {"identity": "0", "folder": folder.name, "decides": {}}
    run.save()
    record = begin_record(folder, Record("pretrain", "0", "running"))
    add_intervention(folder, step=4, guard="loss spike", policy="warn", text="a_long_word" * 20, skipped=[])
    metrics = {"validation_loss": figures["validation_loss"]}
    close_record(folder, record, "done", metrics=metrics, baselines={"ln_vocab": 4.6})
    sample = {"prompt": "2 + 2 = ?", "completion": "</script>" * 30, "answer": "4", "correct": False}
    (folder / "samples.json").write_text(json.dumps([sample]))
    return write_report(run_dir, read_status(run_dir))


@pytest.fixture(scope="module")
def started():
    with browser() as one:
        yield one


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"), (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow), pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_everything_is_drawn_and_has_its_place(started, report, width, scheme):
    assert look_at(started, report, width, scheme) == ["stages", "curves", "questions", "again"]


@pytest.mark.slow
def test_figures_are_told_under_the_pointer_and_smoothing_keeps_the_ends(started, report):
    with page_at(started, report.as_uri(), viewport={"width": 1280, "height": 1000}) as page:
        place = page.locator(".plot").first
        place.scroll_into_view_if_needed()
        place.locator(".u-over").hover()
        assert page.locator(".plot").first.locator(".u-value").first.inner_text().isdigit(), "the step"
        smoothed = page.evaluate("() => smoothed([3, null, 3, 3], 0.9).map(v => v == null ? v : +v.toFixed(9))")
        assert smoothed == [3, None, 3, 3]
        page.locator("#smoothing").fill("0")
        assert page.locator(".plot").first.locator("canvas").count() == 1
        step = page.locator(".plot[data-kind=step]")
        step.scroll_into_view_if_needed()
        step.locator("canvas").hover(position={"x": 300, "y": 10})
        page.locator("#tip", has_text="rank 0").wait_for()
