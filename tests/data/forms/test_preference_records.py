"""Preference records of every form as prompt, chosen and rejected answer."""

from __future__ import annotations

import pytest

from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.forms.preference_records import as_preference

ASKED, GOOD, BAD = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "assistant", "content": "go away"},
)
SHAREGPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "gpt", "value": "go away"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"conversations": [SHAREGPT[0]], "chosen": SHAREGPT[1], "rejected": SHAREGPT[2]},
        {"conversations": [SHAREGPT[0]], "chosen": [SHAREGPT[1]], "rejected": [SHAREGPT[2]], "tools": ""},
        {"question": "hi", "chosen": "hello", "rejected": "go away", "system": ""},
        {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"},
    ],
)
def test_each_form_gives_the_same_pair(record):
    pair = as_preference(record)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.tools) == ((ASKED,), (GOOD,), (BAD,), ())
    chosen, rejected = pair.chats()
    assert (chosen.messages, rejected.messages) == ((ASKED, GOOD), (ASKED, BAD))
    assert chosen.trained_from == rejected.trained_from == 1


def test_what_both_conversations_begin_with_is_the_prompt():
    longer = [ASKED, GOOD, {"role": "user", "content": "how are you?"}]
    pair = as_preference({"chosen": [*longer, GOOD], "rejected": [*longer, BAD]})
    assert pair.prompt == tuple(longer) and pair.chats()[0].trained_from == 3
    same = as_preference({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]})
    assert same.chosen == same.rejected == (GOOD,)


def test_a_system_prompt_belongs_to_the_question():
    record = {"conversations": [{"from": "system", "value": "Be kind."}, SHAREGPT[0]], "chosen": "a", "rejected": "b"}
    assert as_preference(record).question == "Be kind.\nhi"
    assert as_preference({"question": "hi", "chosen": "a", "rejected": "b", "system": "Be kind."}).question == (
        "Be kind.\nhi"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "choosen": "a", "rejected": "b"}, r'has .*\(did you mean "chosen"\?\).*no form of preference'),
        ({"prompt": "x", "chosen": "a"}, "Accepted are conversations, chosen, rejected: ShareGPT"),
        ({"chosen": "a", "rejected": "b"}, '"chosen" must be a list of turns, but is a'),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, '"prompt" is empty'),
        ({"prompt": "x", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, '"chosen" must be text, but is NoneType'),
        ({"prompt": "x", "chosen": [], "rejected": "b"}, '"chosen" must be a list of turns'),
        ({"prompt": "x", "chosen": "a", "rejected": [ASKED]}, '"rejected" must answer the prompt with an assistant'),
        ({"prompt": "x", "chosen": "a", "rejected": [GOOD | {"content": " "}]}, 'last turn of "rejected" is empty'),
        ({"prompt": [ASKED, GOOD], "chosen": "a", "rejected": "b"}, '"prompt" must end before the answer'),
        ({"prompt": [{"role": "system", "content": "x"}], "chosen": "a", "rejected": "b"}, "must hold a user turn"),
        ({"chosen": [ASKED, GOOD], "rejected": [GOOD, BAD]}, "must begin with the same user turn"),
        ({"conversations": [SHAREGPT[0]], "chosen": {"from": "x", "value": ""}, "rejected": "b"}, 'turn 1 of "chosen"'),
    ],
)
def test_what_is_wrong_is_said(record, message):
    with pytest.raises(BadRecord, match=message):
        as_preference(record)
