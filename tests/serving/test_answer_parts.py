"""Thinking, answer and calls are the same however the text is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.serving.answer_parts import AnswerParts
from ray_pipeline.tools.format import CALLS_BEGIN, render_calls

CALL = render_calls([("add", {"a": 1, "b": [2]})])
PIECES = ["<think>", "</think>", " ", "\n", "a", "b c", CALL, CALLS_BEGIN, "<", "<thi"]


@given(st.lists(st.sampled_from(PIECES)), st.lists(st.integers(1, 9)), st.booleans(), st.booleans())
def test_pieces_of_any_size_give_the_parts_of_the_whole(texts, sizes, thinking, tools):
    text = "".join(texts)
    reader, parts, rest = AnswerParts(thinking=thinking, tools=tools), [], text
    for size in [*sizes, len(text) + 1]:
        parts += reader.feed(rest[:size])
        rest = rest[size:]
    parts += reader.finish()
    reasoning, content, calls = AnswerParts(thinking=thinking, tools=tools).whole(text)
    joined = {field: "".join(p.text for p in parts if p.field == field) for field in ("reasoning_content", "content")}
    assert joined["reasoning_content"] == (reasoning or "")
    if not calls:
        assert joined["content"] == content
    assert [c["function"] for c in reader.tool_calls] == [c["function"] for c in calls]


def test_thinking_answer_and_call_are_apart():
    text = f"<think>\nfirst\nsecond \n</think>\n\nIt is 3. {CALL}"
    reasoning, content, calls = AnswerParts(tools=True).whole(text)
    assert (reasoning, content) == ("first\nsecond", "It is 3. ")
    assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"a": 1, "b": [2]}'}]


def test_thinking_that_the_prompt_began_and_nobody_ended_is_no_answer():
    assert AnswerParts(thinking=True).whole("so far") == ("so far", "", [])


def test_a_text_without_marks_is_the_answer_as_it_is():
    assert AnswerParts().whole(" 4 <5\n") == (None, " 4 <5\n", [])


def test_a_block_of_calls_that_cannot_be_read_stays_visible():
    assert AnswerParts(tools=True).whole(f"x{CALLS_BEGIN}y") == (None, f"x{CALLS_BEGIN}y", [])
