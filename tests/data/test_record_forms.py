"""Records as published sets have them: what belongs to a question or an answer is read, or refused by name."""

from __future__ import annotations

import pytest

from ray_pipeline.data.files.fields import BadRecord, Watched
from ray_pipeline.data.forms.chat_records import as_conversation
from ray_pipeline.data.forms.preference_records import as_preference
from ray_pipeline.data.forms.question_records import as_question

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
MATH = {
    "problem": "What is $1+1$?",
    "solution": "One and one make $\\boxed{2}$.",
    "level": "Level 1",
    "type": "Algebra",
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "6*7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.mark.parametrize(
    ("record", "question", "answer"),
    [
        (
            {"instruction": "Who?", "context": "Ann sings.", "response": "Ann", "category": "qa"},
            "Ann sings.\nWho?",
            "Ann",
        ),
        ({"instruction": "Who?", "context": "", "response": "Ann", "category": "qa"}, "Who?", "Ann"),
        ({"query": "1+1?", "response": "2", "type": "x"}, "1+1?", "2"),
        (MATH, "What is $1+1$?", f"<think>{MATH['solution']}</think>2"),
        ({"problem": "1+1?", "solution": "It is 2."}, "1+1?", "It is 2."),
        ({"problem": "1+1?", "solution": "1+1=2", "answer": "2"}, "1+1?", "<think>1+1=2</think>2"),
        ({"question": "Red?", "choices": ["sky", "rose"], "answer": 1}, "Red?\nA. sky\nB. rose", "B"),
        (
            {"prompt": "hi", "response": "hello", "reasoning_content": "A greeting."},
            "hi",
            "<think>A greeting.</think>hello",
        ),
        ({"question": "hi", "answer": "hello", "thinking": "So."}, "hi", "<think>So.</think>hello"),
        ({"instruction": "hi", "output": "hello", "reasoning": "So."}, "hi", "<think>So.</think>hello"),
        ({"prompt": "hi", "completion": "hello", "label": True}, "hi", "hello"),
    ],
)
def test_published_forms_become_conversations(record, question, answer):
    conversation = as_conversation(record)
    assert (conversation.question, conversation.messages[-1]["content"]) == (question, answer)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, SAID], "system": "Be brief."},
        {"messages": [SYSTEM, ASKED, SAID], "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "Be brief."},
        {"id": "cot.1", "system_prompt": "Be brief.", "question": "hi", "response": "hello"},
        {"prompt": "hi", "response": "hello", "system": "Be brief."},
        {"question": "hi", "answer": "hello", "system": "Be brief."},
        {
            "messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]',
            "system": "Be brief.",
        },
    ],
)
def test_a_column_of_the_system_message_comes_first(record):
    assert as_conversation(record).messages == (SYSTEM, ASKED, SAID)


@pytest.mark.parametrize(
    ("record", "asked", "answer"),
    [
        (VERL, "6*7?", "42"),
        (MATH, "What is $1+1$?", "2"),
        (MATH | {"answer": "two"}, "What is $1+1$?", "two"),
        ({"body": "Ann has 2 pens.", "question": "How many?", "answer": 2.0}, "Ann has 2 pens.\nHow many?", "2.0"),
        ({"passage": "It rains.", "question": "Wet?", "answer": "yes"}, "It rains.\nWet?", "yes"),
        ({"question": "Red?", "choices": ["sky", "rose"], "answer": 1}, "Red?\nA. sky\nB. rose", "B"),
        (
            {"question": "Red?", "options": ["sky", "rose"], "answer": "B", "answer_index": 1},
            "Red?\nA. sky\nB. rose",
            "B",
        ),
        ({"question": "Red?", "options": {"A": "sky", "B": "rose"}, "answer": "rose"}, "Red?\nA. sky\nB. rose", "B"),
        (
            {"question": "Red?", "choices": {"text": ["sky", "rose"], "label": ["1", "2"]}, "answerKey": "2"},
            "Red?\n1. sky\n2. rose",
            "2",
        ),
    ],
)
def test_published_forms_become_questions(record, asked, answer):
    question = as_question(record, "c")
    assert (question.prompt, question.answer) == (asked, answer)


@pytest.mark.parametrize(
    ("convert", "record", "message"),
    [
        (
            as_conversation,
            {"prompt": "hi", "completion": "no", "label": False},
            '"label" is false: it marks a bad answer',
        ),
        (as_conversation, {"prompt": "hi", "completion": "no", "label": 0}, '"label" is false'),
        (as_conversation, {"messages": [ASKED, SAID], "images": ["a.png"]}, 'the record has "images", but this model'),
        (as_conversation, {"prompt": "<audio> hi", "response": "a", "audios": ["a.wav"]}, 'the record has "audios"'),
        (as_conversation, {"messages": [SYSTEM, ASKED, SAID], "system": "Sing."}, "has two system messages"),
        (as_conversation, {"question": "a", "answer": "b\n#### 1", "thinking": "c"}, "a worked answer and reasoning"),
        (as_conversation, {"question": "a", "answer": "b", "context": {"title": ["x"]}}, '"context" must be text'),
        (as_question, {"question": "a", "answer": "b", "image": {"bytes": b"x"}}, 'the record has "image"'),
        (as_question, {"question": "a", "answer": "b", "system": "Sing."}, 'has "system", but questions are asked'),
        (as_question, {"question": "a", "answer": "x", "choices": ["b", "c"]}, "the answer x is none of the choices"),
        (as_question, {"question": "a", "answer": 7, "choices": ["b", "c"]}, "the answer 7 is none of the choices"),
        (as_question, {"question": "a", "answer": "b", "choices": "b or c"}, '"choices" must be texts'),
        (as_question, {"problem": "a", "solution": "So it is 2."}, '"solution" marks no final answer by'),
        (as_question, VERL | {"prompt": [SYSTEM, ASKED]}, '"prompt" must be one user turn with a question in it, but'),
        (
            as_preference,
            {"prompt": "other", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
            'do not ask what "prompt"',
        ),
        (as_preference, {"prompt": "hi", "chosen": "a", "rejected": "b", "images": ["x"]}, 'the record has "images"'),
    ],
)
def test_what_would_change_what_is_learned_is_refused(convert, record, message):
    with pytest.raises(BadRecord, match=message):
        convert(record, "c") if convert is as_question else convert(record)


def test_ultrafeedbacks_conversations_hold_their_prompt():
    bad = SAID | {"content": "no"}
    pair = as_preference({"prompt": "hi", "prompt_id": "x", "chosen": [ASKED, SAID], "rejected": [ASKED, bad]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASKED,), (SAID,), (bad,))
    pair = as_preference({"prompt": "hi", "chosen": [ASKED, SAID], "rejected": [ASKED, bad], "system": "Be brief."})
    assert pair.prompt == (SYSTEM, ASKED)


@pytest.mark.parametrize(
    ("convert", "record", "unread"),
    [
        (
            as_conversation,
            {"messages": [ASKED | {"name": "Ann"}, SAID], "id": "7", "score": 0, "note": None},
            {"id", "score", "messages[].name"},
        ),
        (
            as_conversation,
            {"messages": [ASKED, SAID], "tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
            set(),
        ),
        (
            as_conversation,
            {"messages": [ASKED, SAID | {"tool_calls": [{"name": "f", "arguments": {"a": 1}, "index": 0}]}]},
            {"messages[].tool_calls[].index"},
        ),
        (as_conversation, {"prompt": "hi", "response": "hello", "label": "chat"}, {"label"}),
        (as_conversation, MATH, {"level", "type"}),
        (lambda r: as_question(r, "c"), VERL, {"data_source", "ability", "reward_model.style", "extra_info"}),
        (
            as_preference,
            {"prompt": "hi", "chosen": {"role": "assistant", "content": "a", "x": 1}, "rejected": "b"},
            {"chosen.x"},
        ),
    ],
)
def test_what_is_not_read_is_known(convert, record, unread):
    watched = Watched(record)
    convert(watched)
    assert watched.unread() == unread
