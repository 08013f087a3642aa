"""reasoning-gym's own scorers, from questions as DATA_PREP writes them."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.evaluation.marking import are_right, vote
from ray_pipeline.rewards.answer import as_text, extract
from ray_pipeline.rewards.gym import oracle
from ray_pipeline.rewards.registry import get_reward
from ray_pipeline.rewards.scoring import Scorer
from ray_pipeline.settings.post_training import ScoringConfig

gym = pytest.importorskip("reasoning_gym")
TASKS = ("countdown", "chain_sum", "knights_knaves", "basic_arithmetic", "spell_backward", "mini_sudoku", "rearc")


def questions(task, size=4):
    from ray_pipeline.data.tasks.reasoning_gym_source import gym_questions

    return list(gym_questions(task, size, 1))


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_own_answer_is_right_and_nonsense_is_not(task):
    reward = get_reward(f"reasoning_gym:{task}")
    for question in questions(task):
        answer = oracle(question.answer)
        assert reward(question.prompt, f"<think>so</think>\n{answer}\n", question.answer) == 1.0
        assert reward(question.prompt, "<think>so</think>banana", question.answer) < 0.5
        assert reward(question.prompt, f"<think>{answer}", question.answer) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_marked_by_their_tasks_own_verifier(task):
    """Beside a question with a plain reference, as a file may mix them."""
    (question,) = questions(task, 1)
    own = oracle(question.answer)
    answers = [(question.prompt, f"<think>so</think>{text}", question.answer) for text in (own, "banana", "")]
    answers.append(("2 + 2", "<think>so</think>4", "4"))
    answers.append(("q", "<think>so</think>no", '{"answer": "4", "metadata": null}'))
    assert are_right(answers) == [True, False, False, True, False]
    assert vote(f"<think>so</think>{own}", question.answer) == (as_text(extract(own)) or None)


def test_every_way_to_reach_the_number_is_right():
    entry = {"answer": "3+4", "metadata": {"numbers": [3, 4], "target": 7}}
    reward, reference = get_reward("reasoning_gym:countdown"), json.dumps(entry)
    for right in ("3+4", "4+3", "(4 + 3)"):
        assert reward("q", f"<think></think>{right}", reference) == 1.0
    assert reward("q", "<think></think>3*4", reference) < 0.1


def test_a_plain_reference_is_the_answer():
    assert get_reward("reasoning_gym:spell_backward")("q", "<think></think>cba", "cba") == 1.0


def test_a_task_that_misses_its_data_fails_and_is_no_zero():
    settings = ScoringConfig(timeout_seconds=5, max_failures=1.0, processes=1)
    with Scorer({"reasoning_gym:mini_sudoku": 1.0, "reasoning_gym:chain_sum": 1.0}, settings) as scorer:
        scores = scorer.score([("q", "<think></think>7", "7")])
    assert scores.failures.keys() == {"reasoning_gym:mini_sudoku"}
    assert scores.parts[0]["reasoning_gym:chain_sum"] == 1.0
    assert "KeyError" in next(iter(scores.errors.values()))
