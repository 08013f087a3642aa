"""Only `<think>…</think>answer` is well formed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.errors import UserError
from ray_pipeline.rewards.registry import REWARDS, get_reward
from ray_pipeline.rewards.think_format import think_format


@pytest.mark.parametrize("text", ["<think>a</think>b", " <think>a\nb</think>\n\nc ", "<think></think>1"])
def test_one_block_and_an_answer_score_one(text):
    assert think_format("", text, "") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<think>a",
        "a</think>b",
        "<think>a</think>",
        "<think>a</think>  ",
        "b<think>a</think>c",
        "<think>a</think>b<think>c</think>d",
        "<think><think>a</think>b",
        "<think>a</think>b</think>c",
        "</think>a<think>b",
    ],
)
def test_anything_else_scores_zero(text):
    assert think_format("", text, "") == 0.0


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_no_reward_ever_raises(prompt, completion, reference):
    for name in REWARDS:
        assert get_reward(name)(prompt, f"<think>{completion}", reference) in (0.0, 1.0)


def test_an_unknown_reward_is_named_with_the_known_ones():
    with pytest.raises(
        UserError, match=r'reward \'anser\' is not known \(did you mean "answer"\?\). Known: answer, format.'
    ):
        get_reward("anser")
