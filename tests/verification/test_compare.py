"""Differences between two traces, and what is wrong about them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_pipeline.data.rows.loader import PackedRows
from ray_pipeline.data.rows.preferences import PairRows
from ray_pipeline.layout.layout import Layout
from ray_pipeline.verification.cases import TOLERANCES, Case, Tolerance, small_subject
from ray_pipeline.verification.compare import Comparison, Result, compare, difference, judge
from ray_pipeline.verification.made_data import made_groups, write_data
from ray_pipeline.verification.steps import Trace
from ray_pipeline.verification.trainings import stage_config


def trace() -> Trace:
    return Trace(
        losses=[2.0, 1.0],
        norms=[4.0],
        parts=[{"cross_entropy": 30.0, "tokens": 15.0}],
        loads=[{"layers.1.mlp.gate.": torch.tensor([6.0, 2.0, 4.0])}],
        weights={"a": torch.ones(3), "b": torch.zeros(2, 2)},
    )


def test_a_trace_equals_itself() -> None:
    found = compare(trace(), trace())
    assert (found.loss, found.norm, found.weights, found.misrouted, found.routed) == (0.0, 0.0, 0.0, 0, 12)
    assert judge(found, Tolerance(0.0, 0.0, 0.0)) == []


def test_two_experts_of_the_same_score_are_told_where_something_differs() -> None:
    close = replace(trace(), margin=6e-8)
    assert judge(compare(close, trace()), TOLERANCES["fp32"]) == []
    wrong = judge(compare(close, replace(trace(), norms=[4.01])), TOLERANCES["fp32"])
    assert wrong[1:] == ["it may be rounding: two experts' scores came within 6e-08 of each other"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"losses": [2.0, 1.00001]}, "loss differs by 1.0e-05 relative, more than 2e-06"),
        ({"losses": [2.0]}, "loss differs by inf"),
        ({"losses": [2.0, math.nan]}, "loss differs by inf"),
        ({"parts": [{"cross_entropy": 30.001, "tokens": 15.0}]}, "loss differs by 3.3e-05"),
        ({"parts": [{"tokens": 15.0}]}, "loss differs by inf"),
        ({"norms": [4.01]}, "gradient norm differs by 2.5e-03 relative, more than 0.0001"),
        ({"weights": {"a": torch.ones(3), "b": torch.full((2, 2), 0.5)}}, "b differs by 5.0e-01, more than 1e-05"),
        ({"weights": {"a": torch.ones(3)}}, "b differs by inf"),
        ({"weights": {"a": torch.ones(3), "b": torch.zeros(4)}}, "b differs by inf"),
        ({"weights": trace().weights | {"c": torch.zeros(1)}}, "c differs by inf"),
        ({"weights": {"a": torch.full((3,), math.nan), "b": torch.zeros(2, 2)}}, "a differs by inf"),
        ({"loads": [{"layers.1.mlp.gate.": torch.tensor([5.0, 3.0, 4.0])}]}, "1 of 12 tokens went to another expert"),
        ({"loads": [{}]}, "12 of 12 tokens went to another expert"),
    ],
)
def test_whatever_differs_is_told(change: dict, expected: str) -> None:
    wrong = judge(compare(trace(), replace(trace(), **change)), TOLERANCES["fp32"])
    assert len(wrong) == 1
    assert wrong[0].startswith(expected)


def test_bf16_judges_neither_weights_nor_routing() -> None:
    moved = replace(trace(), weights={"a": torch.zeros(3), "b": torch.zeros(2, 2)}, loads=[{}])
    assert judge(compare(trace(), moved), TOLERANCES["bf16"]) == []


def test_difference_is_relative_and_never_hides_what_is_missing() -> None:
    assert difference([1.0, -2.0], [1.0, -2.002]) == pytest.approx(1e-3)
    assert difference([1.0], []) == math.inf
    assert difference([], []) == 0.0


def test_a_result_passes_only_with_a_comparison_and_without_complaint() -> None:
    case = Case(small_subject(Layout()), Layout())
    assert not Result(case, 1.0).passed
    assert Result(case, 1.0, Comparison()).passed
    assert not Result(case, 1.0, Comparison(), wrong=["loss"]).passed
    assert not Result(case, 1.0, Comparison(), error="rank 1: died").passed
    assert Result(case, 1.0, Comparison()).as_dict()["loss"] is None, "JSON knows no infinity"


def test_a_metric_below_one_is_held_against_one_and_a_loss_against_itself() -> None:
    small = replace(trace(), losses=[1e-3, 1e-3], parts=[{"kl": 1e-9, "tokens": 15.0}])
    assert judge(compare(small, replace(small, parts=[{"kl": 3e-9, "tokens": 15.0}])), TOLERANCES["fp32"]) == []
    for change in ({"parts": [{"kl": 1e-4, "tokens": 15.0}]}, {"losses": [1e-3 + 1e-8, 1e-3]}):
        assert judge(compare(small, replace(small, **change)), TOLERANCES["fp32"])


def test_made_up_rows_have_empty_ends_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    subject = small_subject(Layout())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data(tmp_path / name, replace(subject, seed=seed))
    for stage in ("pretrain", "sft"):
        a, b, c = (PackedRows(tmp_path / name / stage / "train").slice(0, 8) for name in "abc")
        assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
        assert a.real is not None and not a.real.all() and a.real[:, 0].all()
    pairs = PairRows(tmp_path / "a" / "preferences" / "train").slice(0, subject.rows)
    assert pairs.real is not None and not pairs.real.all() and int(pairs.extras.pair.max()) == subject.rows - 1


def test_made_up_answers_that_are_trained_score_above_their_groups_mean() -> None:
    subject = small_subject(Layout())
    settings = stage_config(Case(subject, Layout(), stage="grpo")).grpo
    groups = [group for iteration in range(8) for group in made_groups(subject, settings, iteration)]
    for group in groups:
        mean = sum(rollout.reward for rollout in group) / len(group)
        assert not all(rollout.completion.finished for rollout in group)
        assert all(rollout.reward > mean for rollout in group if rollout.completion.finished)
    assert (
        settings.mask_truncated and len({len(rollout.completion.tokens) for group in groups for rollout in group}) > 3
    )


def test_every_batch_of_answers_trains_something_whatever_the_seed() -> None:
    subject = small_subject(Layout())
    settings = stage_config(Case(subject, Layout(), stage="grpo")).grpo
    for seed in range(50):
        for iteration in range(20):
            for group in made_groups(replace(subject, seed=seed), settings, iteration):
                assert [marked.completion.finished for marked in group][:2] == [False, True]
