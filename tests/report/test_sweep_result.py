"""A sweep's table: what is best, what can be told from it, and how it is written."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.evaluation.seed_statistics import holm, seed_test
from ray_pipeline.report.sweep_result import SweepResult, TrialOutcome, held_against_best, setting_row
from ray_pipeline.report.sweep_views import cells, heads, notes, numeric_axes, render_sweep

FIGURES = {"adamw": [2.80, 2.83, 2.81], "muon": [2.60, 2.62, 2.61], "sgd": [2.59, 2.70, 2.58]}


def outcome(name: str, seed: int, figure: float | None) -> TrialOutcome:
    if figure is None:
        return TrialOutcome(f"{name}-seed{seed}", seed, "failed", reason="loss nan\nat step 3")
    return TrialOutcome(f"{name}-seed{seed}", seed, "done", figure, seconds=30.0)


def result_of(tmp_path, figures, *, figure="validation_loss", less=True, values=None) -> SweepResult:
    seeds = range(max(map(len, figures.values())))
    rows = [
        setting_row(
            number, f"name={name}", {"name": name},
            [outcome(name, seed, found[seed]) for seed in seeds if seed < len(found)],
        )
        for number, (name, found) in enumerate(figures.items(), 1)
    ]  # fmt: skip
    rows, best = held_against_best(rows, less=less)
    return SweepResult(tmp_path / "mine", "pretrain", figure, "held-out loss in nats", less, list(seeds), rows, best)


def test_the_best_mean_wins_and_the_others_are_tested_against_it(tmp_path):
    result = result_of(tmp_path, FIGURES)
    assert result.best == 1 and [row.verdict for row in result.rows] == ["worse", "best", "not told apart"]
    tests = [seed_test(FIGURES[name], FIGURES["muon"]) for name in ("adamw", "sgd")]
    assert [row.test for row in result.rows] == [tests[0], None, tests[1]]
    assert [result.rows[0].p_value, result.rows[2].p_value] == holm([test.p_value for test in tests])


def test_more_is_better_where_it_is(tmp_path):
    result = result_of(tmp_path, FIGURES, figure="accuracy", less=False)
    assert result.best == 0 and result.rows[1].verdict == "worse"
    assert result.value(0.125) == "12.5%" and result.value(-0.125, difference=True) == "-12.5 points"


def test_a_setting_with_a_failed_seed_is_counted_and_is_not_best(tmp_path):
    result = result_of(tmp_path, {"adamw": [2.8, 2.9], "muon": [1.0, None]})
    assert result.best == 0 and result.rows[1].mean.count == 1
    assert dict(zip(heads(result), cells(result, result.rows[1]), strict=True))["seeds"] == "1 of 2, 1 FAILED"
    assert notes(result)[-1] == "muon-seed1 FAILED: loss nan"
    assert result_of(tmp_path, {"adamw": [None, None]}).best is None


def test_one_seed_tells_nothing_apart(tmp_path):
    result = result_of(tmp_path, {"adamw": [2.8], "muon": [2.6]})
    assert result.best == 1 and result.rows[0].test is None and result.rows[0].verdict == ""
    assert notes(result)[0].startswith("One seed: nothing tells a difference from chance")


def test_json_is_plain_and_holds_every_figure(tmp_path):
    found = json.loads(json.dumps(result_of(tmp_path, FIGURES).as_json(), allow_nan=False))
    assert found["best"] == 2 and found["metric"]["less_is_better"]
    trials = [trial["figure"] for setting in found["settings"] for trial in setting["trials"]]
    assert trials == [figure for figures in FIGURES.values() for figure in figures]


def test_the_page_escapes_what_settings_hold(tmp_path):
    page = render_sweep(result_of(tmp_path, {"<script>alert(1)</script>": [2.0, 2.1], "b": [3.0, None]}))
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "\\u003cscript" in page
    assert "b-seed1 FAILED: loss nan" in page


@pytest.mark.parametrize(
    ("names", "numeric"),
    [(["1e-4", "1e-3", "1e-2"], True), (["1", "2"], False), (["a", "1", "2"], False)],
)
def test_axes_of_numbers_get_a_plot_of_their_own(tmp_path, names, numeric):
    result = result_of(tmp_path, {name: [2.0, 2.1 + index] for index, name in enumerate(names)})
    assert numeric_axes(result) == (["name"] if numeric else [])


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_plots_are_drawn_in_a_browser(tmp_path, width, scheme):
    from tests.report.test_page_in_browser import SIDEWAYS
    from tests.serving.browser import browser, page_at

    figures = {"1e-4": [2.80, 2.83, 2.81], "1e-3": [2.60, None, 2.61], "1e-2": [2.59, 2.70, 2.58]}
    path = tmp_path / "sweep.html"
    path.write_text(render_sweep(result_of(tmp_path, figures)))
    size = {"width": width, "height": 1000}
    with browser() as one, page_at(one, path.as_uri(), viewport=size, color_scheme=scheme) as page:
        page.locator("canvas").last.wait_for()
        assert page.locator("canvas").count() == 2, "by setting, and by the numbers of its axis"
        low, high = page.evaluate(
            "() => { const y = document.querySelector('.plot').plot.scales.y; return [y.min, y.max] }"
        )
        assert low < 2.58 and 2.83 < high < 4, "all points are in sight"
        page.locator(".plot").first.scroll_into_view_if_needed()
        page.locator(".u-over").first.hover(position={"x": 5, "y": 50})
        told = page.locator(".u-legend").first.inner_text()
        assert "name=1e-4" in told and "2.813" in told and "2.83" in told
        assert page.evaluate(SIDEWAYS) == []
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
