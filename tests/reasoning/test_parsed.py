"""A completion as data: thinking, steps, answer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.tasks.mixes import PROMPT_MIX, draw_unique
from ray_pipeline.reasoning import CLOSE, OPEN, parse

TEXTS = st.lists(st.one_of(st.text(max_size=4), st.sampled_from([OPEN, CLOSE, "<think", "</think"])), max_size=12).map(
    "".join
)
PLAIN = st.text(max_size=20).filter(lambda text: "think>" not in text)


def test_a_well_formed_completion():
    found = parse("<think>3+4=7\n7*2=14</think>The answer is 14.")
    assert found.thinking == "3+4=7\n7*2=14"
    assert found.steps == ("3+4=7", "7*2=14")
    assert found.answer == "The answer is 14."
    assert (found.opened, found.closed, found.unclosed, found.before) == (1, 1, False, "")


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "unclosed"),
    [
        ("42", "", "42", False),
        ("<think>a", "a", None, True),
        ("<think>a</think>", "a", "", False),
        ("<think>a</think>b<think>c</think>d", "a\nc", "d", False),
        ("<think>a</think>b<think>c", "a\nc", "b<think>c", True),
        ("<think>a<think>b</think>c", "a<think>b", "c", False),
        ("<think>a<think>b</think>c</think>d", "a<think>b", "d", False),
        ("<think><think></think>", "<think>", "", False),
        ("a</think>b", "", "b", False),
        ("", "", "", False),
    ],
)
def test_nested_unclosed_and_several_blocks(text, thinking, answer, unclosed):
    found = parse(text)
    assert (found.thinking, found.answer, found.unclosed) == (thinking, answer, unclosed)


@given(TEXTS)
def test_the_parts_are_the_text_and_the_answer_is_what_follows_the_last_tag(text):
    found = parse(text)
    assert found.text == text
    expected = text.rpartition(CLOSE)[2] if CLOSE in text else None if OPEN in text else text
    assert found.answer == expected
    assert len(found.blocks) <= found.opened
    kinds = [event.kind for event in found.events]
    assert all(a != b or a in ("open", "close") for a, b in itertools.pairwise(kinds))


@given(PLAIN, PLAIN)
def test_what_is_put_in_comes_out(steps, answer):
    found = parse(f"{OPEN}{steps}{CLOSE}{answer}")
    assert (found.thinking, found.answer) == (steps, answer)


@pytest.mark.parametrize(
    ("thinking", "steps"),
    [
        ("3+5=8 8-2=6", ("3+5=8", "8-2=6")),
        ("First add. Then halve; done!", ("First add.", "Then halve;", "done!")),
        ("He has 3. He buys 2.\nSo 3+2=5.", ("He has 3. He buys 2.", "So 3+2=5.")),
        ("x = 5", ("x = 5",)),
        ("  \n\n", ()),
    ],
)
def test_steps_are_lines_equations_or_sentences(thinking, steps):
    assert parse(f"<think>{thinking}</think>1").steps == steps


def test_built_in_questions_have_steps_and_answer():
    for question in draw_unique(PROMPT_MIX, 0, "prompts", 50):
        found = parse(question.completion)
        assert found.answer == question.answer and found.thinking == question.steps
        assert found.steps and "".join("".join(found.steps).split()) == "".join(question.steps.split())
