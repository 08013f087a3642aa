"""`--grid` as it is typed: values, ranges, combinations, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.dag.sweeps.sweep_grid import Axis, Range, combinations, corners, overrides, parse_grid
from ray_pipeline.errors import UserError

STAGES = ("pretrain", "sft")


def test_values_and_their_combinations_with_the_last_axis_fastest():
    axes = parse_grid(["pretrain.optimizer.name=adamw,muon", "model.attention= mla, gqa "], STAGES)
    assert [axis.values for axis in axes] == [("adamw", "muon"), ("mla", "gqa")]
    assert [tuple(values.values()) for values in combinations(axes)] == [
        ("adamw", "mla"), ("adamw", "gqa"), ("muon", "mla"), ("muon", "gqa"),
    ]  # fmt: skip
    assert combinations(()) == [{}]


def test_a_key_without_its_stage_is_that_of_every_stage():
    [axis] = parse_grid(["optimizer.name=adamw,muon"], STAGES)
    assert axis.keys == ("pretrain.optimizer.name", "sft.optimizer.name")
    assert overrides([axis], {"optimizer.name": "muon"}) == dict.fromkeys(axis.keys, "muon")
    # A key of one stage alone, one that is whole already, and one that does not exist stay as they are.
    names = ["indexer_warmup_steps=0,1", "model.rope_theta=1e4,1e5", "optimizer.nam=a,b"]
    assert [axis.keys for axis in parse_grid(names, STAGES)] == [
        ("indexer_warmup_steps",), ("model.rope_theta",), ("optimizer.nam",),
    ]  # fmt: skip


def test_commas_in_brackets_part_no_values():
    [axis] = parse_grid(["pretrain.optimizer.betas=[0.9, 0.95],[0.9, 0.99]"], STAGES)
    assert axis.values == ("[0.9, 0.95]", "[0.9, 0.99]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4..1e-2", Range(1e-4, 1e-2, False, True)),
        ("0.1..0.5", Range(0.1, 0.5, False, False)),
        ("2..8", Range(2, 8, True, False)),
        ("-1..1", Range(-1, 1, True, False)),
        ("0..100", Range(0, 100, True, False)),
        ("8..512", Range(8, 512, True, True)),
    ],
)
def test_ranges(text, expected):
    [axis] = parse_grid([f"pretrain.steps={text}"], STAGES)
    assert (axis.values, axis.range) == ((), expected)


@given(st.floats(1e-6, 1.0), st.floats(1.01, 100.0), st.floats(0.0, 1.0))
def test_a_value_of_a_range_is_written_so_that_it_is_read_again(low, factor, share):
    span = Range(low, low * factor, False, factor >= 10)
    value = low + share * (low * factor - low)
    assert float(span.text(value)) == pytest.approx(value, rel=1e-3)
    assert span.text(float(span.text(value))) == span.text(value)


def test_corners_hold_every_value_and_both_ends():
    axes = parse_grid(["model.attention=mla,gqa,mha", "pretrain.optimizer.lr=1e-4..1e-2"], STAGES)
    found = corners(axes)
    assert {values["model.attention"] for values in found} == {"mla", "gqa", "mha"}
    assert {values["pretrain.optimizer.lr"] for values in found} == {"0.0001", "0.01"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["pretrain.steps"], "no values of a key"),
        (["=3"], "no values of a key"),
        (["pretrain.steps="], "no values of a key"),
        (["pretrain.steps=1,,2"], "an empty value"),
        (["pretrain.steps=1,2,1"], "1 is given twice"),
        (["pretrain.steps=1..4,9"], "a range stands alone"),
        (["pretrain.steps=4..1"], "from a smaller number to a larger"),
        (["pretrain.steps=1,2", "steps=3,4"], "pretrain.steps is given by --grid pretrain.steps already"),
        (["seed=1,2"], "Use --seeds N"),
        (["run_name=a,b"], "a name of its own"),
        (["layout.gpus=1,2"], "It changes no result"),
    ],
)
def test_what_is_no_grid_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        parse_grid(given, STAGES)


def test_ranges_and_too_many_combinations_are_no_grid():
    with pytest.raises(UserError, match="--search optuna"):
        combinations(parse_grid(["pretrain.optimizer.lr=1e-4..1e-2"], STAGES))
    many = Axis("a", ("a",), tuple(map(str, range(40))))
    with pytest.raises(UserError, match="1600 combinations, more than 1000"):
        combinations([many, Axis("b", ("b",), many.values)])
