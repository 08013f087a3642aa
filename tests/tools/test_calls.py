"""Calls are found in what a model wrote, exactly those that stand there, and nothing makes the parser raise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.tools.calls import BadCall, ToolCall, own_words, parse_calls, without_outputs
from ray_pipeline.tools.format import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    JSON_CLOSE,
    JSON_OPEN,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEPARATOR,
    TOOL_TOKENS,
    render_call,
    render_calls,
    render_output,
    without_tool_tokens,
)

NAMES = st.from_regex(r"[a-z_][a-z0-9_.]{0,12}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=5), VALUES, max_size=3)), min_size=1, max_size=4)
NOISE = st.lists(
    st.one_of(
        st.text(max_size=5), st.sampled_from([*TOOL_TOKENS, "function", JSON_OPEN, JSON_CLOSE, "{}", '{"a": 1}', "f"])
    ),
    max_size=14,
).map("".join)


def test_the_format_is_deepseek_v3s():
    assert render_calls([("get_weather", {"city": "Köln"})]) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Köln"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )
    assert render_output(["1", "2"]) == (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    assert render_output("1") == render_output(["1"])


@given(CALLS, st.text(max_size=10), st.text(max_size=10))
def test_rendered_calls_are_parsed_back(calls, before, after):
    assert parse_calls(before + render_calls(calls) + after) == [ToolCall(name, given) for name, given in calls]


def test_arguments_that_are_text_are_written_as_they_are():
    written = '{"b": 1,  "a": 2.50}'
    assert written in render_call("f", written)
    assert parse_calls(render_calls([("f", written)])) == [ToolCall("f", {"b": 1, "a": 2.5})]


def block(inside: str) -> str:
    return f"{CALLS_BEGIN}{inside}{CALLS_END}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (render_call("f", {}), "outside of"),
        (CALLS_BEGIN + render_call("f", {}), f"{CALLS_END} is missing"),
        (block(""), "no call"),
        (block("soon"), "text between calls"),
        (block(CALL_BEGIN + "function"), f"{CALL_END} is missing"),
        (block(f"{CALL_BEGIN}f{JSON_OPEN}{{}}{JSON_CLOSE}{CALL_END}"), "a call begins with"),
        (block(f"{CALL_BEGIN}tool{SEPARATOR}f{JSON_OPEN}{{}}{JSON_CLOSE}{CALL_END}"), "a call begins with"),
        (block(f"{CALL_BEGIN}function{SEPARATOR}f\n{{}}{CALL_END}"), "between ```json"),
        (block(render_call("", {})), "name"),
        (block(render_call(" f", {})), "name"),
        (block(render_call("f", "[1]")), "not a JSON object"),
        (block(render_call("f", "{1}")), "not a JSON object"),
        (block(render_call("f", '{"a": NaN}')), "not a JSON object"),
        (block(render_call("f", "[" * 100_000)), "not a JSON object"),
        (block(render_call("f", json.dumps({"a": SEPARATOR}, ensure_ascii=False))), "a tool token within a call"),
    ],
)
def test_what_cannot_be_read_is_a_bad_call_with_a_reason(text, reason):
    (found,) = parse_calls(text)
    assert isinstance(found, BadCall) and reason in found.reason
    assert found.text in text


def test_calls_around_a_bad_one_are_kept():
    text = block(f"{render_call('f', {})}\n{render_call('g', '{')}\n{render_call('h', {})}") + render_calls([("i", {})])
    assert [getattr(call, "name", "bad") for call in parse_calls(text)] == ["f", "bad", "h", "i"]


@given(NOISE)
def test_no_text_makes_it_raise_and_a_call_needs_its_tokens(text):
    found = parse_calls(text)
    assert sum(isinstance(call, ToolCall) for call in found) <= text.count(CALL_BEGIN)
    if CALL_BEGIN not in without_outputs(text) and CALLS_BEGIN not in without_outputs(text):
        assert found == []


@given(NOISE)
def test_a_tools_output_can_neither_call_nor_end_its_block(output):
    rendered = render_output([output, "next"])
    assert not any(token in without_tool_tokens(output) for token in TOOL_TOKENS)
    assert rendered.count(OUTPUTS_BEGIN) == rendered.count(OUTPUTS_END) == 1
    assert parse_calls(f"a{rendered}b") == [] and without_outputs(f"a{rendered}b") == "ab"


def test_own_words_are_what_is_left():
    text = "a" + render_calls([("f", {})]) + render_output(["42"]) + "b" + OUTPUTS_BEGIN + "never ends"
    assert own_words(text) == "ab"
    assert own_words("a" + CALLS_BEGIN + "never ends") == "a"
    assert own_words("<think>x</think>7") == "<think>x</think>7"
