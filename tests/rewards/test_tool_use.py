"""Calls are right where they are the expected ones, or fit the schemas of the tools that the prompt describes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.rewards.tool_use import expected_calls, tool_calls
from ray_pipeline.tools.calls import ToolCall
from ray_pipeline.tools.format import CALLS_BEGIN, CALLS_END, render_calls, render_output
from ray_pipeline.tools.tool import describe

ADD, GREET = ("add", {"a": 1, "b": 2}), ("greet", {"name": "Ada"})
EXPECTED = json.dumps({"name": "add", "arguments": {"b": 2, "a": 1.0}})
BOTH = json.dumps([{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "greet", "arguments": '{"name": "Ada"}'}])
PROMPT = describe([
    {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}},
])  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "reference", "value"),
    [
        ([ADD], EXPECTED, 1.0),
        ([GREET, ADD], BOTH, 1.0),
        ([ADD], BOTH, 0.5),
        ([ADD, GREET], EXPECTED, 0.5),
        ([ADD, ADD], EXPECTED, 0.5),
        ([("add", {"a": 1, "b": 3})], EXPECTED, 0.0),
        ([("add", {"a": True, "b": 2})], EXPECTED, 0.0),
        ([("sum", {"a": 1, "b": 2})], EXPECTED, 0.0),
        ([], EXPECTED, 0.0),
        ([], "[]", 1.0),
        ([ADD], "[]", 0.0),
        ([ADD], json.dumps({"calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]}), 1.0),
    ],
)
def test_expected_calls_are_made_in_any_order_and_no_others(calls, reference, value):
    completion = "<think>x</think>" + (render_calls(calls) if calls else "42")
    assert tool_calls("q", completion, reference) == value


@pytest.mark.parametrize(
    ("calls", "value"),
    [
        ([ADD], 1.0),
        ([ADD, ("add", {"a": "1"})], 0.5),
        ([ADD, ("add", {"b": 1})], 0.5),
        ([ADD, GREET], 0.5),
        ([("calculator", {"expression": "1"})], 0.0),
    ],
)
def test_without_expected_calls_the_schemas_of_the_prompt_hold(calls, value):
    assert tool_calls(PROMPT, render_calls(calls) + render_output(["3"] * len(calls)) + "3", "3") == value


def test_without_a_description_the_built_in_tools_are_known():
    call = render_calls([("calculator", {"expression": "6*7"})])
    assert tool_calls("q", call + render_output("42") + "42", "42") == 1.0
    assert tool_calls("q", render_calls([("calculator", {"formula": "6*7"})]), "42") == 0.0
    assert tool_calls("q", "42", "42") == 0.0


def test_unreadable_calls_count_as_wrong():
    broken = CALLS_BEGIN + "add(1, 2)" + CALLS_END
    assert tool_calls(PROMPT, render_calls([ADD]) + broken, "3") == 0.5
    assert tool_calls(PROMPT, render_calls([ADD]) + broken, EXPECTED) == 0.5


@pytest.mark.parametrize("reference", ["42", "", "{", '{"answer": 1}', "[1]", '[{"name": 1}]', "null", '"text"'])
def test_other_references_expect_no_calls_in_particular(reference):
    assert expected_calls(reference) is None


@given(st.lists(st.sampled_from([ADD, GREET, ("add", {"a": 1})]), max_size=5))
def test_a_reference_is_matched_by_its_own_calls_alone(calls):
    reference = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert expected_calls(reference) == [ToolCall(name, arguments) for name, arguments in calls]
    completion = render_calls(calls) if calls else "nothing to do"
    assert tool_calls("", completion, reference) == 1.0
    assert tool_calls("", completion + render_calls([GREET]), reference) < 1.0
