"""Logged figures as the page's charts have them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.report.charts import LARGEST, MOST_EXPERTS, MOST_POINTS, expert_maps, stage_charts
from ray_pipeline.report.run_facts import embedded


def logged(name: str, points: list[tuple[int, float]]) -> list[dict]:
    return [{"stage": "sft", "step": step, name: value} for step, value in points]


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats()), max_size=20))
def test_charts_of_any_figures_are_json_without_what_is_no_number(points):
    charts = stage_charts(logged("train/loss", points), {"ln_vocab": float("nan")})
    embedded(charts)  # which refuses NaN and infinity
    finite = {step: value for step, value in points if abs(value) < LARGEST}
    assert [chart["x"] for chart in charts] == ([sorted(finite)] if finite else [])
    assert all(chart["levels"] == [] for chart in charts)


def test_names_with_a_star_are_all_that_were_logged_and_each_stands_once():
    lines = [{"stage": "grpo", "step": 1, "grpo/reward": 1.0, "grpo/answer_reward": 0.5, "grpo/format_reward": 0.5}]
    [chart] = stage_charts(lines, {})
    assert chart["title"] == "Reward and its parts"
    assert [one["name"] for one in chart["series"]] == ["reward", "answer reward", "format reward"]


def test_of_many_points_a_share_is_shown_with_every_evaluation_and_the_last():
    lines = logged("train/loss", [(step, 1.0) for step in range(1, 4 * MOST_POINTS + 2)])
    lines += logged("val/validation_loss", [(1002, 2.0), (2001, 1.5)])
    [chart] = stage_charts(lines, {})
    assert chart["every"] == 5 and len(chart["x"]) < MOST_POINTS
    assert {1, 1002, 2001, 4 * MOST_POINTS + 1} <= set(chart["x"])
    values = dict(zip(chart["x"], chart["series"][1]["values"], strict=True))
    assert {step: value for step, value in values.items() if value is not None} == {1002: 2.0, 2001: 1.5}


def test_loads_are_shares_of_their_layers_mean_and_of_many_experts_means_of_neighbours():
    lines = logged("moe/layers.10/load", [(2, [1, 3, 0, 4])]) + logged("moe/layers.2/load", [(2, [0, 0])])  # type: ignore[list-item]
    few, many = expert_maps(lines)
    assert (few["layer"], few["rows"]) == ("layers.2", [[0], [0]])
    assert (many["layer"], many["rows"]) == ("layers.10", [[50], [150], [0], [200]])
    [wide] = expert_maps(logged("moe/layers.1/load", [(1, [2] * 128 + [4] * 128)]))  # type: ignore[list-item]
    assert wide["experts"] == 256 and len(wide["rows"]) == MOST_EXPERTS
    assert wide["rows"][0] == [67] and wide["rows"][-1] == [133]
