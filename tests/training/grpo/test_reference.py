"""When GRPO's reference is taken from the policy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.training.grpo.reference import refreshed_at


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 60))
def test_a_run_that_goes_on_has_the_reference_of_one_that_never_stopped(every, updates, steps):
    """Walk through the iterations and take the policy's weights whenever `every` more steps were made."""
    since = last = 0
    for begins in range(0, steps * updates, updates):
        if every and begins // every > last // every:
            since = begins
        last = begins
        assert refreshed_at(begins, every, updates) == since


def test_without_a_refresh_the_input_model_stays():
    assert {refreshed_at(step, 0, 2) for step in range(0, 40, 2)} == {0}
