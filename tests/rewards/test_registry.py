"""Rewards are found by every kind of name, or refused with the names there are."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.errors import UserError
from ray_pipeline.reasoning import CLOSE, OPEN
from ray_pipeline.rewards import registry
from ray_pipeline.rewards.registry import check_reward_names, get_reward, known_rewards
from ray_pipeline.tools.format import TOOL_TOKENS
from tests.rewards import made

BUILTIN = {"answer", "math", "exact", "format", "length", "repetition", "code", "tool_calls"}
IN_PROCESS = BUILTIN - {"math", "code"}


def test_the_built_in_rewards_are_known_and_those_that_may_hang_are_isolated():
    known = known_rewards()
    assert set(known) >= BUILTIN
    assert {name for name in BUILTIN if not known[name].isolated} == IN_PROCESS


TEXTS = st.lists(
    st.text(max_size=8)
    | st.sampled_from(
        [*TOOL_TOKENS, OPEN, CLOSE, "####", "\\boxed{", '{"name": "f"}', "[", "### f\nParameters: {}", "1/0"]
    ),
    max_size=10,
).map("".join)


@given(TEXTS, TEXTS, TEXTS)
def test_no_reward_that_runs_in_process_ever_raises(prompt, completion, reference):
    for name in IN_PROCESS:
        assert -1.0 <= get_reward(name)(prompt, f"<think>{completion}", reference) <= 1.0
        assert -1.0 <= get_reward(name)(prompt, completion, reference) <= 1.0


def test_a_decorated_function_and_a_named_one_are_found():
    assert get_reward("shouts")("", "ABC", "") == 1.0 and get_reward("shouts").isolated
    assert get_reward("tests.rewards.made:brevity")("", "x" * 100, "") == -1.0
    assert get_reward("tests.rewards.made:brevity").address == "tests.rewards.made:brevity"


def test_entry_points_bring_rewards(monkeypatch):
    entry = EntryPoint("brief", "tests.rewards.made:brevity", registry.ENTRY_POINTS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry._load.cache_clear()
    assert get_reward("brief").function is made.brevity
    registry._load.cache_clear()


def test_a_reasoning_gym_task_is_a_reward():
    pytest.importorskip("reasoning_gym")
    assert get_reward("reasoning_gym:chain_sum")("1 + 1?", "<think></think>2", "2") == 1.0
    with pytest.raises(UserError, match=r'no task "countdwn" \(did you mean "countdown"\?\)'):
        get_reward("reasoning_gym:countdwn")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"anser": 1.0},
            r"reward 'anser' is not known \(did you mean \"answer\"\?\). Known: answer, .*\"module:function\"",
        ),
        ({"no_such_module:f": 1.0}, "importing no_such_module failed"),
        ({"tests.rewards.made:brief": 1.0}, r'has no function "brief" \(did you mean "brevity"\?\)'),
        ({}, "grpo.rewards is empty"),
        ({"answer": 0.0}, "every weight is 0"),
    ],
)
def test_names_that_cannot_work_are_refused_before_anything_starts(weights, said):
    with pytest.raises(UserError, match=said):
        check_reward_names(weights)


def test_names_that_work_are_accepted():
    check_reward_names({"answer": 1.0, "format": 0.1, "code": 1.0, "tests.rewards.made:brevity": -0.1})


def test_a_machine_without_a_sandbox_or_math_verify_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="untrusted programs cannot be confined"):
        check_reward_names({"code": 1.0})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match='reward "math": needs math-verify. Run: pip install'):
        check_reward_names({"math": 1.0})


def test_checking_names_is_cheap():
    script = (
        "import sys\nfrom ray_pipeline.rewards.registry import check_reward_names\n"
        "from ray_pipeline.tools.known_tools import check_tool_names\n"
        "check_reward_names({'answer': 1, 'math': 1, 'code': 1, 'tool_calls': 1})\n"
        "check_tool_names(['calculator', 'python'])\n"
        "print([m for m in ('torch', 'ray', 'math_verify', 'sympy', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
