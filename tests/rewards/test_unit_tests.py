"""A program is right if it passes its tests, and there is no other way to pass."""

from __future__ import annotations

import json
import time

import pytest

from ray_pipeline.rewards.registry import get_reward
from ray_pipeline.rewards.scoring import Scorer
from ray_pipeline.rewards.unit_tests import code_block, read_tests, unit_tests
from ray_pipeline.settings.post_training import ScoringConfig

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]
PROGRAM = "a, b = map(int, input().split())\nif __name__ == '__main__':\n    print(a + b, end='  \\n')\n"


def answer(code: str, fence: str = "python") -> str:
    return f"<think>```python\nnot this\n```</think>Here:\n```{fence}\n{code}```\nDone."


@pytest.mark.parametrize(
    ("code", "reference"),
    [
        (ADD, ASSERTS),
        (ADD, json.dumps({"tests": ASSERTS})),
        (ADD, json.dumps({"tests": ASSERTS.split("\n")})),
        (ADD, json.dumps(ASSERTS.split("\n"))),
        (ADD, "def check(f):\n    assert f(2, 2) == 4\ncheck(add)"),
        (ADD + "if __name__ == '__main__':\n    print(input())", ASSERTS),
        (PROGRAM, json.dumps(PAIRS)),
        (PROGRAM, json.dumps({"tests": PAIRS})),
        (PROGRAM, json.dumps({"inputs": ["1 2", ["7 1"]], "outputs": ["3", ["8"]]})),
    ],
)
def test_right_programs_pass_tests_of_every_form(code, reference):
    assert unit_tests("", answer(code), reference) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a - b\n",
        "def add(a, b):\n    return 3\n",
        "x = (",
        "",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\n1/0",
        ADD + "'''",
        "import os\nos.write(1, b'passed')\nos.fork()",
        "import os\nos.write = print\nos._exit(0)",
    ],
)
def test_wrong_programs_fail_and_leaving_early_is_not_passing(code):
    assert unit_tests("", answer(code), ASSERTS) == 0.0


def test_wrong_output_of_a_whole_program_fails():
    assert unit_tests("", answer("print(3)"), json.dumps(PAIRS)) == 0.0
    assert unit_tests("", answer(PROGRAM + "1/0"), json.dumps(PAIRS)) == 0.0


def test_what_hangs_fails_in_time_and_is_no_failure_of_the_reward():
    with Scorer({"code": 1.0}, ScoringConfig(timeout_seconds=4.0, max_failures=0.0, processes=1)) as scorer:
        started = time.monotonic()
        scores = scorer.score([("q", answer("while True: pass"), ASSERTS), ("q", answer(ADD), ASSERTS)])
    assert scores.rewards == [0.0, 1.0] and scores.failures == {}
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "reference", ["", "  ", "assert add(1 ==", "42", '{"tests": 3}', "[]", '{"inputs": [], "outputs": []}']
)
def test_a_reference_without_tests_is_a_failure_and_not_a_zero(reference):
    with pytest.raises(ValueError, match="reference"):
        unit_tests("", answer(ADD), reference)


def test_no_program_scores_zero():
    for completion in ("", "<think>```python\n" + ADD + "```", "<think></think>add = sum"):
        assert unit_tests("", completion, ASSERTS) == 0.0


def test_the_last_block_counts_and_may_be_cut_off():
    assert code_block("```python\na\n```\n```py\nb\n```") == "b\n"
    assert code_block("```\na\n") == "a\n"
    assert code_block("no code") is None
    assert read_tests(json.dumps(PAIRS)) == [("1 2\n", "3\n"), ("5 5", "10")]


def test_it_is_the_reward_called_code():
    assert get_reward("code").function is unit_tests and get_reward("code").isolated
