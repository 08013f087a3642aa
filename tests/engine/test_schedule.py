"""Schedules, simulated: nothing waits forever, backwards follow their forwards, activations stay within bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.engine.schedule import Action, forward_only, one_forward_one_backward


def simulate(stages: int, micro_batches: int, schedule) -> int:
    """Run all stages until done; returns the number of rounds, or fails when none can move."""
    plans = [list(schedule(stage)) for stage in range(stages)]
    finished: set[tuple[int, Action]] = set()
    rounds = 0
    while any(plans):
        moved = []
        for stage, plan in enumerate(plans):
            if not plan:
                continue
            action = plan[0]
            source = stage - 1 if action.forward else stage + 1
            free = source in (-1, stages) or (source, action) in finished
            if free and (action.forward or (stage, Action(True, action.micro_batch)) in finished):
                moved.append((stage, plan.pop(0)))
        assert moved, f"deadlock at {[plan[0] for plan in plans if plan]}"
        finished.update(moved)
        rounds += 1
    return rounds


@given(st.integers(1, 8), st.integers(1, 16))
def test_1f1b_never_deadlocks_and_its_length_is_the_formula(stages, micro_batches):
    rounds = simulate(stages, micro_batches, lambda s: one_forward_one_backward(s, stages, micro_batches))
    assert rounds == 2 * (micro_batches + stages - 1)


@given(st.integers(1, 8), st.integers(1, 16))
def test_1f1b_keeps_at_most_stages_minus_index_activations(stages, micro_batches):
    for stage in range(stages):
        alive = peak = 0
        actions = one_forward_one_backward(stage, stages, micro_batches)
        for action in actions:
            alive += 1 if action.forward else -1
            peak = max(peak, alive)
        assert alive == 0 and peak == min(stages - stage, micro_batches)
        assert sorted(actions) == sorted(
            [Action(True, i) for i in range(micro_batches)] + [Action(False, i) for i in range(micro_batches)]
        )


@given(st.integers(1, 8), st.integers(1, 16))
def test_forward_only_never_deadlocks(stages, micro_batches):
    assert simulate(stages, micro_batches, lambda _: forward_only(micro_batches)) == micro_batches + stages - 1
