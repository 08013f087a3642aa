"""Turns in OpenAI's and ShareGPT's notation become one form."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.files.record_files import read_records
from ray_pipeline.data.forms.chat_records import as_conversation

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
EXPECTED = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
AS_TEXT = json.dumps({"name": "weather", "arguments": {"city": "Köln"}})
SHAREGPT = [
    {"from": "human", "value": "How is it?"},
    {"from": "gpt", "value": "I look."},
    {"from": "function_call", "value": AS_TEXT},
    {"from": "function_call", "value": AS_TEXT},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "It rains."},
]


def openai(call):
    return [EXPECTED[0], {**EXPECTED[1], "tool_calls": [call, call]}, *EXPECTED[2:]]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": openai(CALL), "tools": [{"type": "function", "function": TOOL}]},
        {"messages": openai({"function": {"name": "weather", "arguments": '{"city": "Köln"}'}}), "tools": [TOOL]},
        {"messages": openai(CALL["function"]), "tools": json.dumps([TOOL])},
        {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
        {"conversations": [*SHAREGPT[:2], {"from": "function_call", "value": f"[{AS_TEXT}, {AS_TEXT}]"}, *SHAREGPT[4:]],
         "tools": [TOOL]},
    ],
)  # fmt: skip
def test_calls_in_any_notation_give_the_same_conversation(record):
    conversation = as_conversation(record)
    assert list(conversation.messages) == EXPECTED
    assert conversation.tools == ({"type": "function", "function": TOOL},)
    assert conversation.calls_tools and conversation.question == "How is it?"
    assert conversation.text == 'How is it?\nI look.\nweather {"city": "Köln"}\nweather {"city": "Köln"}\n' + (
        "rain\nIt rains."
    )


def test_ids_of_calls_are_kept_for_templates_that_write_them():
    call = {**CALL, "id": "abc123456"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    output = {"role": "tool", "content": "rain", "tool_call_id": "abc123456", "name": "weather"}
    messages = [EXPECTED[0], called, output, EXPECTED[3]]
    read = as_conversation({"messages": messages}).messages
    assert list(read) == [EXPECTED[0], {**called, "content": ""}, output, EXPECTED[3]]


def test_calls_and_tools_from_parquet_have_their_own_keys_alone(tmp_path):
    schema = {"type": "object", "properties": {"sum": {"type": "string", "enum": ["a", None]}}}
    add = {"name": "add", "description": "Adds.", "parameters": schema}
    called = [CALL, {"type": "function", "function": {"name": "add", "arguments": {"sum": "1+2", "of": [{"a": 1}]}}}]
    messages = [EXPECTED[0], {**EXPECTED[1], "tool_calls": called}, *EXPECTED[2:]]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages, "tools": [TOOL, add]}]), tmp_path / "a.parquet"
    )
    [(_, record)] = read_records(tmp_path / "a.parquet")
    assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln", "sum": None, "of": None}
    conversation = as_conversation(record)
    assert conversation.messages[1]["tool_calls"] == called
    assert conversation.tools == tuple({"type": "function", "function": tool} for tool in (TOOL, add))


def test_null_in_arguments_that_are_json_text_is_what_was_called():
    call = {"function": {"name": "weather", "arguments": '{"city": null}'}}
    read = as_conversation({"messages": openai(call)}).messages
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}
    written = as_conversation({"conversations": [SHAREGPT[0], {**SHAREGPT[2], "value": json.dumps(call["function"])}]})
    assert written.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_a_conversation_may_end_with_a_call():
    conversation = as_conversation({"conversations": SHAREGPT[:3]})
    assert conversation.messages[-1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}


def test_arguments_may_be_missing():
    read = as_conversation({"messages": [EXPECTED[0], {"role": "assistant", "tool_calls": [{"name": "now"}]}]})
    assert read.messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "function_call", "value": "weather(Köln)"}], r"turn 2 .*: not valid JSON .*weather\(Köln\)"),
        ([{"from": "function_call", "value": "[]"}], "turn 2 .*: holds no call"),
        ([{"from": "function_call", "value": '{"arguments": {}}'}], 'turn 2 .*: a call needs a "name"'),
        ([{"from": "function_call", "value": '{"name": "f", "arguments": "x"}'}], "turn 2 .*not valid JSON"),
        ([{"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}], "arguments of f must be a JSON obj"),
        ([{"from": "observation", "value": "rain"}], "turn 2 .* is what came of a call, but no call stands before"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "turn 2 .* only an assistant calls tools"),
        ([{"role": "assistant", "content": 3, "tool_calls": [CALL]}], 'turn 2 .* needs a "content" that is text'),
        ([{"role": "assistant", "tool_calls": [3]}], 'turn 2 .*: a call needs a "name" and "arguments", not 3'),
        (
            [{"role": "assistant", "tool_calls": [{"type": "custom", "name": "f"}]}],
            'turn 2 .*: tools are of the type "function", not custom',
        ),
        (["x"], 'turn 2 .* must have a "role" and a "content", but is x'),
    ],
)
def test_a_malformed_turn_is_named(turns, message):
    with pytest.raises(BadRecord, match=message):
        as_conversation({"conversations": [SHAREGPT[0], *turns, SHAREGPT[-1]]})


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", '"tools": not valid JSON'),
        ({"name": "f"}, '"tools" must be a list of functions'),
        ([{"description": "f"}], 'each of "tools" needs a "name"'),
        ([{"type": "web", "name": "f"}], '"tools": tools are of the type "function", not web'),
        ([{"name": "f", "parameters": "x"}], '"tools": parameters of f is x'),
        ([{"name": "f", "description": 3}], '"tools": description of f is 3'),
    ],
)
def test_malformed_tools_are_named(tools, message):
    with pytest.raises(BadRecord, match=message):
        as_conversation({"messages": EXPECTED, "tools": tools})
