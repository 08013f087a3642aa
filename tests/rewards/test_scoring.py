"""A reward that fails is counted, shown and left out; it is never a silent 0."""

from __future__ import annotations

import math

import pytest

from ray_pipeline.errors import UserError
from ray_pipeline.rewards.answer import answer
from ray_pipeline.rewards.scoring import Scorer, Scores
from ray_pipeline.rewards.think_format import think_format
from ray_pipeline.settings.post_training import ScoringConfig
from tests.rewards import made

SOMETIMES = "tests.rewards.made:sometimes"


def scoring(**changes):
    return ScoringConfig(**{"timeout_seconds": 1.0, "max_failures": 1.0, "processes": 2} | changes)


def items(*completions):
    return [("q", completion, "42") for completion in completions]


def test_rewards_are_weighted_sums_of_their_parts():
    asked = items("<think>a</think>42", "<think>a</think>41", "42", "<think>")
    with Scorer({"answer": 1.0, "format": 0.1, SOMETIMES: -0.5}, scoring()) as scorer:
        scores = scorer.score(asked)
    for (prompt, completion, reference), parts, reward in zip(asked, scores.parts, scores.rewards, strict=True):
        expected = {
            "answer": answer(prompt, completion, reference),
            "format": think_format(prompt, completion, reference),
            SOMETIMES: len(completion) / 10,
        }
        assert parts == expected and list(parts) == list(expected)
        assert reward == pytest.approx(parts["answer"] + 0.1 * parts["format"] - 0.5 * parts[SOMETIMES], abs=1e-12)
    assert scores.failed == [False] * 4 and scores.failures == {} and scores.errors == {}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_failures_are_counted_and_left_out_whatever_the_number_of_processes(processes):
    asked = items("abc", "nothing", "raise", "hang", "infinite", "abcdef", "raise")
    with Scorer({SOMETIMES: 1.0, "answer": 0.0}, scoring(processes=processes)) as scorer:
        scores = scorer.score(asked)
        again = scorer.score(items("ab"))
    assert scores.failed == [False, True, True, True, True, False, True]
    assert [math.isnan(reward) for reward in scores.rewards] == scores.failed
    assert [math.isnan(parts[SOMETIMES]) for parts in scores.parts] == scores.failed
    assert not any(math.isnan(parts["answer"]) for parts in scores.parts)
    assert (scores.rewards[0], scores.rewards[5]) == (0.3, 0.6)
    assert scores.failures == {SOMETIMES: 5}
    assert scores.errors == {SOMETIMES: "returned None, which is no finite number"}
    assert again.rewards == [0.2] and again.failures == {}


def test_a_reward_that_fails_in_process_is_counted_alike():
    assert made.overconfident
    with Scorer({"overconfident": 1.0}, scoring()) as scorer:
        scores = scorer.score(items("ab", ""))
    assert scores.failed == [False, True] and scores.rewards[0] == 0.5
    assert scores.errors == {"overconfident": "ZeroDivisionError: division by zero"}


def test_a_failed_part_makes_the_reward_nan_even_with_weight_zero():
    with Scorer({"answer": 1.0, SOMETIMES: 0.0}, scoring()) as scorer:
        scores = scorer.score(items("raise"))
    assert scores.failed == [True] and math.isnan(scores.rewards[0])


@pytest.mark.parametrize(("failing", "stops"), [(1, False), (2, True)])
def test_too_many_failures_stop_the_run_naming_reward_count_and_first_error(failing, stops):
    asked = items(*["raise"] * failing, *["fine"] * (20 - failing))
    with Scorer({"format": 1.0, SOMETIMES: 1.0}, scoring(max_failures=0.05)) as scorer:
        if not stops:
            assert scorer.score(asked).failures == {SOMETIMES: 1}
            return
        with pytest.raises(
            UserError,
            match=rf'the reward "{SOMETIMES}" failed for 2 of 20 completions, more than max_failures=0.05 allows. '
            r"First error: RuntimeError: asked to raise \(made.py, line \d+\).*grpo.scoring.timeout_seconds",
        ):
            scorer.score(asked)


def test_nothing_to_score_is_no_failure():
    with Scorer({SOMETIMES: 1.0, "answer": 1.0}, scoring(max_failures=0.0)) as scorer:
        assert scorer.score([]) == Scores()


def test_an_unknown_reward_and_a_local_function_are_refused_at_once():
    with pytest.raises(UserError, match="reward 'anser' is not known"):
        Scorer({"anser": 1.0}, scoring())
