"""Which prompts a GRPO step asks, and what a batch of rollouts holds."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.training.rollout_source import RolloutSource


def source(questions: int, per_step: int, seed: int) -> RolloutSource:
    """Just enough of one to draw prompts."""
    made = RolloutSource.__new__(RolloutSource)
    made.questions = [{}] * questions
    made.settings = SimpleNamespace(prompts_per_step=per_step)
    made.rank = SimpleNamespace(config=SimpleNamespace(seed=seed))
    return made


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(1, 8))
def test_every_question_is_asked_once_an_epoch_whatever_the_step_size(questions, per_step, seed, iterations):
    drawn = source(questions, per_step, seed)
    asked = [index for i in range(iterations) for index in drawn.prompts(i)]
    assert len(asked) == iterations * per_step
    for start in range(0, len(asked) - questions + 1, questions):
        assert Counter(asked[start : start + questions]) == Counter(range(questions))


@given(st.integers(2, 40), st.integers(1, 50), st.integers(0, 9))
def test_prompts_of_a_step_do_not_depend_on_the_steps_before(questions, per_step, iteration):
    fresh, used = source(questions, per_step, 3), source(questions, per_step, 3)
    for i in range(iteration):
        used.prompts(i)
    assert fresh.prompts(iteration) == used.prompts(iteration)
