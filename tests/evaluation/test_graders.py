"""Answers are marked as the task says: by their result, by a reward in another process, or by running them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.evaluation.graders import AnswerScoring, RewardScoring, TestScoring, code_of, program
from ray_pipeline.evaluation.marking import vote
from ray_pipeline.evaluation.tasks import Item, Request, make_task


def test_answers_are_marked_as_in_training() -> None:
    items = [Item("0", "p", "12"), Item("1", "p", "12"), Item("2", "p", "yes")]
    assert AnswerScoring().score(items, ["<think>a</think>12", "<think>12", "YES."]) == [1.0, 0.0, 1.0]


def test_math_is_marked_by_its_value() -> None:
    pytest.importorskip("math_verify")
    items = [Item("0", "p", "\\frac{1}{2}")] * 3
    with RewardScoring("math") as scoring:
        assert scoring.score(items, ["So it is \\boxed{0.5}.", "\\boxed{\\frac{2}{4}}", "\\boxed{2}"]) == [
            1.0,
            1.0,
            0.0,
        ]


def test_reasoning_gym_marks_with_its_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    made = make_task("reasoning_gym:countdown", Request(limit=3))
    answers = [json.loads(item.data["reference"])["metadata"]["expression"] for item in made.items]
    with made.scoring as scoring:
        right = scoring.score(made.items, [f"<think>hm</think>{answer}" for answer in answers])
        wrong = scoring.score(made.items, ["<think>hm</think>1"] * 3)
    assert right == [1.0] * 3 and all(score < 1 for score in wrong)


def raising(prompt: str, completion: str, reference: str) -> float:
    if completion == "raise":
        raise RuntimeError("no")
    return 1.0


def test_a_reward_that_fails_is_no_mark() -> None:
    with RewardScoring(f"{__name__}:raising") as scoring:
        assert scoring.score([Item("0", "p", "1")] * 3, ["a", "raise", "b"]) == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<think>```python\nno\n```</think>Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\na\n```\nbetter:\n```py\nb\n```", "b\n"),
        ("```python\nx = 1", "x = 1"),
        ("x = 1", "x = 1"),
        ("<think>never ends", ""),
    ],
)
def test_code_is_the_last_block_of_the_answer(text: str, code: str) -> None:
    assert code_of(text) == code


def test_code_that_continues_the_prompt_is_put_behind_it() -> None:
    data = {"before": "def f(n):\n", "name": "f"}
    assert program("```python\n    return n\n```", data) == "def f(n):\n    return n\n"
    assert program("```python\ndef f(n):\n    return n\n```", data) == "def f(n):\n    return n\n"


EXERCISE = Item("0", "Write f.", "", data={"tests": "assert f(2) == 4\nassert f(3) == 9"})


@pytest.mark.parametrize(
    ("code", "mark"),
    [
        ("def f(n):\n    return n * n", 1.0),
        ("def f(n):\n    return n + 2", 0.0),
        ("def f(n):\n    return n *", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("raise SystemExit(0)", 0.0),
        ("while True:\n    pass", 0.0),
        ("print('assert')", 0.0),
    ],
)
def test_a_program_is_right_when_its_tests_reach_their_end(code: str, mark: float) -> None:
    assert TestScoring(wall_seconds=2.0).score([EXERCISE], [f"```python\n{code}\n```"]) == [mark]


def test_humaneval_runs_its_own_check(tmp_path: Path) -> None:
    record = {
        "task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """Sum."""\n', "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    }  # fmt: skip
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(record) + "\n")
    made = make_task(f"humaneval:{path}", Request())
    [item] = made.items
    assert item.id == "HumanEval/0" and record["prompt"].rstrip() in item.prompt and not made.votes
    whole = f"```python\n{record['prompt']}{record['canonical_solution']}```"
    answers = [whole, f"```python\n{record['canonical_solution']}```", "```python\n    return a - b\n```"]
    assert made.scoring.score([item] * 3, answers) == [1.0, 1.0, 0.0]


def test_our_own_exercises_are_solved_by_their_solutions() -> None:
    made = make_task("programming_functions", Request(limit=5))
    assert made.scoring.score(made.items, [f"```python\n{item.reference}```" for item in made.items]) == [1.0] * 5


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("<think>a</think>72 apples", "72", 72),
        ("The total is 72.", "72", 72),
        ("\\boxed{1/2}", "0.5", 0.5),
        ("<think>never ends", "72", None),
        ("<think>a</think> ", "72", None),
        ("<think>a</think>Yes.", "no", "yes"),
        ("12, 15", "15, 12", "12, 15"),
        ("no number", "72", None),
    ],
)
def test_a_vote_is_the_answers_value(text: str, reference: str, expected: object) -> None:
    assert vote(text, reference) == expected
