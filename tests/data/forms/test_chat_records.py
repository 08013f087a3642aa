"""Records as documents, conversations and questions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.data.files.fields import BadRecord, Watched
from ray_pipeline.data.forms.chat_records import as_conversation, as_document
from ray_pipeline.data.forms.preference_records import as_preference
from ray_pipeline.data.forms.question_records import as_question, split_answer

GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many together?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 1,072",
}
STEPS = "In May she sold 48/2 = 24 clips.\nTogether 48+24 = 72."
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
parts = st.fixed_dictionaries({}, optional={"type": json_values, "text": json_values})
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]),
            "content": json_values | st.lists(parts),
            "from": st.sampled_from(["human", "gpt", "function_call", "observation", "system"]),
            "value": json_values | st.just('{"name": "f", "arguments": {}}'),
            "weight": json_values | st.sampled_from([0, 1, True, False]),
            "thinking": json_values,
            "function_call": json_values,
            "images": st.none() | json_values,
            "tool_calls": json_values | st.just([{"function": {"name": "f", "arguments": "{}"}}]),
        },
    ),
    max_size=4,
)
fields = (
    "text", "messages", "prompt", "response", "completion", "question", "answer", "instruction", "output", "history",
    "conversations", "tools", "system", "role", "content", "difficulty", "chosen", "rejected", "choices", "options",
    "context", "body", "problem", "solution", "query", "label", "reward_model", "answerKey", "reasoning", "functions",
)  # fmt: skip


def test_gsm8k_steps_are_thought_and_the_last_line_is_the_answer():
    assert split_answer(GSM8K["answer"]) == (STEPS, "1,072")
    conversation = as_conversation(GSM8K)
    assert conversation.question == GSM8K["question"]
    assert conversation.messages[1]["content"] == f"<think>{STEPS}</think>1,072"
    question = as_question(GSM8K, "gsm8k")
    assert (question.answer, question.category, question.difficulty) == ("1,072", "gsm8k", 2)


def test_an_answer_without_working_stands_alone():
    assert split_answer(" 42 ") == ("", "42")
    assert as_conversation({"question": "6*7?", "answer": "42"}).messages[1]["content"] == "42"
    assert as_question({"question": "6*7?", "answer": 42}, "c").answer == "42"


def test_own_question_lines_come_back():
    line = {"prompt": "6*7?", "answer": "42", "category": "product", "difficulty": 3}
    assert as_question(line, "other").record() == line


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a"}, "a"),
        ({"messages": TURNS}, "hi\nhello"),
        ({"prompt": "a", "response": "b"}, "a\nb"),
        ({"question": "a", "answer": "b"}, "a\nb"),
        ({"messages": TURNS, "system": "Be brief."}, "Be brief.\nhi\nhello"),
        ({"question": "a", "answer": "B", "context": "c", "choices": ["x", "y"]}, "c\na\nA. x\nB. y\nB"),
        ({"prompt": "a", "response": "b", "system_prompt": "s"}, "s\na\nb"),
    ],
)
def test_documents(record, text):
    assert as_document(record) == text


def test_a_column_may_be_named():
    assert as_document({"story": "once", "text": "no", "images": ["a.png"]}, "story") == "once"
    with pytest.raises(BadRecord, match='needs a field "story", but has "text"'):
        as_document({"text": "no"}, "story")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": [turn | {"tool_calls": None, "name": None} for turn in TURNS], "tools": None},
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"instruction": "hi", "input": "", "output": "hello", "system": "", "history": []},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "tools": "[]"},
        {"conversations": TURNS},
    ],
)
def test_each_form_gives_the_same_conversation(record):
    conversation = as_conversation(record)
    assert list(conversation.messages) == TURNS and conversation.tools == ()


def test_alpaca_with_everything():
    record = {
        "instruction": "Translate.", "input": "cat", "output": "Katze", "system": "Be brief.", "history": [["hi", "ho"]]
    }  # fmt: skip
    assert [(m["role"], m["content"]) for m in as_conversation(record).messages] == [
        ("system", "Be brief."), ("user", "hi"), ("assistant", "ho"), ("user", "Translate.\ncat"),
        ("assistant", "Katze"),
    ]  # fmt: skip


def test_sharegpts_system_column_comes_first():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    messages = as_conversation({"conversations": turns, "system": "Be brief."}).messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("convert", "record", "message"),
    [
        (as_document, {"body": "x"}, 'needs a field "text".*but has "body"'),
        (as_document, {}, "has no fields at all"),
        (as_document, {"text": 3}, '"text" must be text, but is int'),
        (as_document, {"text": "<image> a cat", "images": ["a.png"]}, 'the record has "images", but this model reads'),
        (as_conversation, {"text": "x"}, 'has "text", which is no form of conversation. Accepted are "messages"'),
        (as_conversation, {"mesages": TURNS}, r'has "mesages" \(did you mean "messages"\?\)'),
        (as_conversation, {"messages": []}, "must be a list of turns"),
        (
            as_conversation,
            {"messages": [{"role": "asistant", "content": "x"}]},
            r'turn 1 of "messages" needs a "role" of system, user, assistant, tool, function, not asistant \(did',
        ),
        (as_conversation, {"messages": TURNS[:1]}, r"end with an assistant turn, but has \['user'\]"),
        (as_conversation, {"messages": TURNS[1:]}, "must hold a user turn"),
        (as_conversation, {"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "nothing to learn"),
        (as_conversation, {"prompt": "", "response": "x"}, '"prompt" is empty'),
        (as_conversation, {"prompt": "x", "completion": [TURNS[0]]}, "end with an assistant turn"),
        (as_conversation, {"instruction": "x", "output": ""}, '"output" is empty'),
        (as_conversation, {"instruction": "x", "output": "y", "input": 3}, '"input" must be text, but is int'),
        (as_conversation, {"instruction": "x", "output": "y", "history": [["a"]]}, 'pair 1 of "history" must be a'),
        (as_conversation, {"instruction": "x", "output": "y", "history": "a"}, '"history" must be a list'),
        (as_conversation, {"conversations": "x"}, '"conversations" must be a list of turns'),
        (as_conversation, {"conversations": [{"from": "human"}]}, 'turn 1 of "conversations" needs a "value" that is'),
        (as_conversation, {"conversations": [{"from": "bot", "value": "x"}]}, 'a "from" of system, human, user, gpt'),
        (as_question, {"question": "x"}, 'needs "question" and "answer", but has "question"'),
        (as_question, {"question": "x", "answer": None}, '"answer" must be text, but is NoneType'),
    ],
)
def test_what_is_missing_is_said(convert, record, message):
    with pytest.raises(BadRecord, match=message):
        convert(record, "c") if convert is as_question else convert(record)


@given(st.dictionaries(st.sampled_from(fields), json_values | turns, max_size=5))
def test_any_record_is_converted_or_refused(record):
    for convert in (as_document, as_conversation, lambda r: as_question(r, "c"), as_preference):
        watched = Watched(record)
        try:
            convert(watched)
        except BadRecord as error:
            assert str(error)
        assert watched.unread() is not None


@given(st.text())
def test_splitting_an_answer_never_fails(answer):
    steps, final = split_answer(answer)
    assert "\n" not in final or not steps
