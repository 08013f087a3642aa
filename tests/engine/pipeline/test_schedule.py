"""Schedules, simulated: no deadlock, every action once and in order, memory and bubble as the formulas say."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.parallel.placement import PARTS_PER_RANK, V_SHAPED, parts_of
from ray_pipeline.engine.pipeline.schedule import Action, Schedule, build_schedule, forward_only
from ray_pipeline.engine.pipeline.schedule_simulation import Costs, simulate

ranks = st.integers(1, 8)
counts = st.integers(1, 32)
names = st.sampled_from(sorted(PARTS_PER_RANK))


@st.composite
def cases(draw) -> tuple[str, int, int]:
    """A schedule's name, pp and a number of micro-batches it takes."""
    name, pp, count = draw(names), draw(ranks), draw(counts)
    return name, pp, count + 2 * pp if name == "dualpipev" else count


@given(cases())
def test_every_rank_does_each_of_its_actions_once_and_backward_after_forward(case):
    name, pp, count = case
    schedule = build_schedule(name, pp, count)
    for rank, order in enumerate(schedule.actions):
        done = Counter(order)
        for stage in parts_of(name, pp, rank):
            assert schedule.rank_of[stage] == rank
            for i in range(count):
                place = {kind: order.index(a) for kind in "FBIW" if (a := Action(kind, stage, i)) in done}
                assert set(place) in ({"F", "B"}, {"F", "I", "W"})
                assert sorted(place, key=place.__getitem__) in (["F", "B"], ["F", "I", "W"])
        assert set(done.values()) == {1}
        assert {a.stage for a in order} == set(parts_of(name, pp, rank)) and {a.micro_batch for a in order} == set(
            range(count)
        )


durations = st.integers(1, 9)


@given(cases(), durations, durations, durations, st.integers(0, 9), st.randoms())
def test_no_schedule_deadlocks_whatever_actions_and_messages_take(case, forward, inputs, weights, message, random):
    name, pp, count = case
    schedule = build_schedule(name, pp, count)
    stages = tuple(random.randint(1, 5) for _ in range(schedule.stages))
    costs = Costs(forward, inputs + weights, inputs, weights, message, stages)
    result = simulate(schedule, costs)
    for rank, busy in enumerate(result.busy):
        parts = sum(stages[stage] for stage in parts_of(name, pp, rank))
        assert busy == count * parts * (forward + inputs + weights) <= result.finish


@given(names, ranks, counts)
def test_forward_only_runs_every_forward_once_and_idles_only_at_the_ends(name, pp, count):
    schedule = forward_only(name, pp, count)
    expected = {Action("F", stage, i) for stage in range(schedule.stages) for i in range(count)}
    assert sorted(a for order in schedule.actions for a in order) == sorted(expected)
    finish = simulate(schedule).finish
    if name in V_SHAPED:
        assert finish == 2 * (count - 1) + 2 * pp  # the last micro-batch goes up and down before it ends
    elif name == "1f1b" or count >= pp:
        assert finish == PARTS_PER_RANK[name] * count + pp - 1


@given(ranks, counts)
def test_1f1b_keeps_pp_minus_rank_activations_and_has_the_formulas_bubble(pp, count):
    result = simulate(build_schedule("1f1b", pp, count))
    assert result.peak_activations == tuple(min(pp - rank, count) for rank in range(pp))
    assert result.finish == 3 * (count + pp - 1)
    bubble = 1 - Fraction(result.busy[0], result.finish)
    assert bubble == Fraction(pp - 1, count + pp - 1) and result.bubble[0] == pytest.approx(float(bubble))


@given(ranks, counts)
def test_interleaved_halves_the_bubble_for_any_number_of_micro_batches_from_pp_on(pp, extra):
    count = pp + extra - 1
    result = simulate(build_schedule("interleaved_1f1b", pp, count))
    bubble = {1 - Fraction(busy, result.finish) for busy in result.busy}
    assert bubble == {Fraction(pp - 1, 2 * count + pp - 1)}


@given(ranks, counts)
def test_interleaved_activations_stay_within_a_round_and_the_way_back(pp, count):
    result = simulate(build_schedule("interleaved_1f1b", pp, count))
    largest = -(-count // max(1, count // pp))  # micro-batches of the largest round: pp where it divides
    bounds = [min(largest + 2 * (pp - 1 - rank) + 1, 2 * count) for rank in range(pp)]
    assert list(result.peak_activations) == bounds
    assert count % pp or largest == pp


@given(ranks, counts)
def test_zbv_idles_only_until_the_first_activation_arrives(pp, count):
    """arXiv:2401.10241: with F = I = W a rank idles pp - 1 forwards, whatever the number of micro-batches."""
    unit = Costs(1, 2, 1, 1)
    result = simulate(build_schedule("zbv", pp, count), unit)
    assert max(result.peak_activations) <= min(2 * pp, 2 * count)  # half-sized parts: 1F1B's first rank, everywhere
    if count >= 2 * pp - 1:
        assert result.finish == 6 * count + pp - 1
        if pp > 1:
            interleaved = simulate(build_schedule("interleaved_1f1b", pp, count), unit)
            assert max(result.bubble) < max(interleaved.bubble)


@given(ranks, counts)
def test_dualpipev_idles_as_little_and_holds_one_activation_more(pp, extra):
    count = 2 * pp + extra - 1
    result = simulate(build_schedule("dualpipev", pp, count), Costs(1, 2, 1, 1))
    assert result.finish == 6 * count + pp - 1
    assert max(result.peak_activations) == 2 * pp + 1


def test_dualpipev_with_too_few_micro_batches_is_refused():
    with pytest.raises(ValueError, match=r"dualpipev with 5 micro-batches per step: it needs at least .* = 6. Use"):
        build_schedule("dualpipev", 3, 5)


def test_a_deadlock_names_the_actions_that_wait():
    # Both ranks wait for the other: the gradient of the first micro-batch before the second's activation, and round.
    first = (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1))
    second = (Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1))
    schedule = Schedule("made up", 2, 2, (0, 1), (first, second))
    with pytest.raises(ValueError) as error:
        simulate(schedule)
    assert str(error.value) == (
        "schedule made up with pp=2 is stuck: rank 0 at B(stage 0, micro-batch 0), rank 1 at F(stage 1, micro-batch 1)"
    )


@pytest.mark.parametrize(
    "order",
    [
        (Action("B", 0, 0), Action("F", 0, 0)),
        (Action("F", 0, 0), Action("W", 0, 0), Action("I", 0, 0)),
        (Action("F", 0, 0), Action("F", 0, 0)),
    ],
)
def test_actions_out_of_order_are_refused(order):
    with pytest.raises(ValueError, match="can come before it"):
        simulate(Schedule("made up", 1, 1, (0,), (order,)))


def test_an_unequal_stage_sets_the_pace():
    slow = simulate(build_schedule("1f1b", 2, 8), Costs(stages=(1, 3)))
    assert slow.finish == 1 + 8 * 9 + 2 and slow.busy == (24, 72)
