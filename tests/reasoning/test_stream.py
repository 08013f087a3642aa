"""However a text is cut into pieces, the same parts of it are thinking, and no character is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.reasoning.parsed import join_events, parse
from ray_pipeline.reasoning.stream import CLOSE, OPEN, ThinkStream

PIECES = st.one_of(
    st.text(max_size=4), st.sampled_from([OPEN, CLOSE, "<", "</", "think>", "<think", "</think", ">", "<<think>", "\n"])
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def events(text, cuts=(), state="normal"):
    """(kind, text) of a text that is fed in pieces."""
    stream = ThinkStream(state)
    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    found = [e for a, b in itertools.pairwise(borders) for e in stream.feed(text[a:b])]
    return found + stream.finish(), stream.state


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        ("4", ["normal"]),
        ("<think>a</think>b", ["open", "thinking", "close", "answering"]),
        ("x<think>a</think>", ["normal", "open", "thinking", "close"]),
        ("<think>a", ["open", "thinking"]),
        ("<think>a</think>b<think>c</think>d",
         ["open", "thinking", "close", "answering", "open", "thinking", "close", "answering"]),
        ("<think>a<think>b</think>c", ["open", "thinking", "open", "thinking", "close", "answering"]),
        ("a</think>b", ["normal", "close", "answering"]),
        ("<think", ["normal"]),
        ("<<think>", ["normal", "open"]),
        ("</think></think>", ["close", "close"]),
    ],
)  # fmt: skip
def test_states_follow_the_tags(text, kinds):
    assert [event.kind for event in events(text)[0]] == kinds


@given(TEXTS, st.lists(st.integers(0, 60), max_size=8))
def test_any_cutting_gives_the_same_events_and_the_text_itself(text, cuts):
    found, state = events(text, cuts)
    whole, whole_state = events(text)
    assert join_events(found) == join_events(whole)
    assert state == whole_state
    assert "".join(event.text for event in found) == text
    assert all(event.text for event in found)
    tags = [event.text for event in found if event.kind in ("open", "close")]
    assert (tags.count(OPEN), tags.count(CLOSE)) == (text.count(OPEN), text.count(CLOSE))


@given(TEXTS)
def test_letter_by_letter_no_more_is_held_back_than_a_tag_may_need(text):
    stream = ThinkStream()
    told = 0
    for read, letter in enumerate(text, start=1):
        told += sum(len(event.text) for event in stream.feed(letter))
        assert read - len(CLOSE) < told <= read
        held = text[told:read]
        assert OPEN.startswith(held) or CLOSE.startswith(held)


def test_a_prompt_that_began_the_thinking():
    found, state = events("a</think>b", state="thinking")
    assert [(event.kind, event.text) for event in found] == [("thinking", "a"), ("close", CLOSE), ("answering", "b")]
    assert state == "answering"


def test_text_is_told_as_soon_as_it_is_certain():
    stream = ThinkStream()
    assert [e.text for e in stream.feed("so <")] == ["so "]
    assert stream.feed("thi") == []
    assert [e.text for e in stream.feed("s")] == ["<this"]
    assert [e.kind for e in stream.feed("<think>x")] == ["open", "thinking"]
    assert stream.state == "thinking"


def test_a_long_text_is_read_quickly():
    assert parse("<" * 300_000 + "<think>" * 50_000 + "</think>7").answer == "7"
