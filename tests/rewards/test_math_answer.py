"""Answers that are mathematically the same are right, others are not, and no time limit is math-verify's own."""

from __future__ import annotations

import threading

import pytest

from ray_pipeline.rewards.registry import get_reward
from ray_pipeline.rewards.scoring import Scorer
from ray_pipeline.settings.post_training import ScoringConfig

pytest.importorskip("math_verify")
math_answer = get_reward("math")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"So $x = \frac{2}{4}$.", r"\frac{1}{2}", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        (r"\boxed{\{1, 2\}}", r"\{2,1\}", True),
        (r"\boxed{(0, 1]}", "(0,1]", True),
        ("The answer is 72.", "48/2 = 24, 48+24=72\n#### 72", True),
        ("1,234", "1234", True),
        (r"\boxed{\frac{1}{3}}", "0.5", False),
        (r"\boxed{(0, 1)}", "(0,1]", False),
        (r"\boxed{x^2+1}", "x^2+2x+1", False),
        ("", "1", False),
        ("I do not know.", "1", False),
    ],
)
def test_answers_are_compared_as_mathematics(answer, reference, right):
    assert math_answer("q", f"<think>\\boxed{{999}}</think>{answer}", reference) == float(right)


def test_unfinished_thinking_is_no_answer():
    assert math_answer("q", r"<think>\boxed{1}", "1") == 0.0


def test_a_reference_that_is_no_mathematics_is_a_failure_and_not_a_zero():
    with pytest.raises(ValueError, match="is not mathematics"):
        math_answer("q", "<think></think>1", "")


def test_it_needs_no_main_thread():
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(math_answer("q", r"<think></think>\boxed{3}", "3")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_what_takes_for_ever_is_a_failure():
    endless = r"<think></think>\boxed{" + "+".join(rf"\sqrt[7]{{{i}!}}" for i in range(2000, 2400)) + "}"
    with Scorer({"math": 1.0}, ScoringConfig(timeout_seconds=2.0, max_failures=1.0, processes=1)) as scorer:
        scores = scorer.score([("q", endless, r"\sqrt{2}"), ("q", "<think></think>2", "2")])
    assert scores.failures == {"math": 1} and scores.errors == {"math": "took longer than 2 seconds"}
    assert scores.rewards[1] == 1.0
