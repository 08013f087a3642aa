"""Only `<think>…</think>answer` is well formed."""

from __future__ import annotations

import pytest

from ray_pipeline.rewards.think_format import think_format
from ray_pipeline.tools.format import render_calls, render_output


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


def test_calls_of_tools_may_stand_anywhere():
    called = render_calls([("calculator", {"expression": "6*7"})]) + render_output("</think>42")
    assert think_format("", f"{called}<think>a</think>42", "") == 1.0
    assert think_format("", f"<think>a</think>{called}42", "") == 1.0
    assert think_format("", f"<think>a</think>{called}", "") == 0.0
