"""Keys of a turn that change what is learned are read, or refused by name."""

from __future__ import annotations

import pytest

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.files.fields import BadRecord
from ray_pipeline.data.forms.chat_records import as_conversation
from ray_pipeline.data.forms.preference_records import as_preference
from ray_pipeline.data.text.builtin_text import document_at

ASKED = {"role": "user", "content": "2+3?"}
SAID = {"role": "assistant", "content": "5"}
CALL = {"name": "add", "arguments": '{"a": 2, "b": 3}'}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_trained(train_bpe([document_at(0, index) for index in range(100)], 320), path)
    return load_tokenizer(path)


def answer_of(**turn):
    return as_conversation({"messages": [ASKED, SAID | turn]}).messages[1]["content"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_content_is_thought(name):
    assert answer_of(**{name: "2 and 3 make 5."}) == "<think>2 and 3 make 5.</think>5"
    assert answer_of(**{name: None}) == answer_of(**{name: ""}) == "5"
    assert answer_of(**{name: "2+3=5", "content": "<think>2+3=5</think>5"}) == "<think>2+3=5</think>5"


def test_reasoning_before_a_call_is_thought():
    turn = {"role": "assistant", "content": None, "reasoning_content": "I add.", "tool_calls": [CALL]}
    assert as_conversation({"messages": [ASKED, turn]}).messages[1]["content"] == "<think>I add.</think>"


def test_content_in_parts_is_read():
    parts = [{"type": "thinking", "thinking": "2+3=5"}, {"type": "text", "text": "5"}, {"type": "text", "text": "!"}]
    assert answer_of(content=parts) == "<think>2+3=5</think>5\n!"
    assert answer_of(content=[{"type": "output_text", "text": "5"}]) == answer_of(content=["5"]) == "5"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}])
def test_a_turn_marked_so_is_not_trained(tokenizer, flag):
    turns = [ASKED, SAID | {"content": "six"} | flag, ASKED, SAID | {"weight": 1}]
    conversation = as_conversation({"messages": turns})
    assert conversation.messages == (ASKED, SAID | {"content": "six"}, ASKED, SAID)
    [(ids, mask)] = tokenizer.encode_chats([conversation.chat()])
    trained = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert tokenizer.decode(trained) == "5"


def test_sharegpts_turns_are_marked_too():
    turns = [{"from": "human", "value": "2+3?", "loss": False}, {"from": "gpt", "value": "six", "train": False}]
    turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "5"}]
    assert as_conversation({"conversations": turns}).untrained == {1}


def test_what_is_said_and_its_call_share_a_mark():
    said = {"from": "gpt", "value": "I add.", "train": False}
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    end = [{"from": "observation", "value": "5"}, {"from": "gpt", "value": "5"}]
    human = {"from": "human", "value": "2+3?"}
    assert as_conversation({"conversations": [human, said, call | {"train": False}, *end]}).untrained == {1}
    with pytest.raises(BadRecord, match=r"turn 3 .* are one turn, but one of the two alone is trained"):
        as_conversation({"conversations": [human, said, call, *end]})


def test_openais_first_form_of_calls_is_read():
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "name": "add", "content": "5"},
        SAID,
    ]
    read = as_conversation({"messages": turns, "functions": [{"name": "add"}]})
    assert read.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    ]
    assert read.messages[2] == {"role": "tool", "name": "add", "content": "5"}
    assert read.tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([ASKED, SAID | {"weight": 0.5}], r'turn 2 .* has "weight": 0\.5, but a turn is learned from \(1 or true\) or'),
        ([ASKED, SAID | {"loss": "no"}], 'turn 2 .* has "loss": no'),
        ([ASKED, SAID | {"weight": 1, "train": False}], "turn 2 .* is to be trained and not to be trained"),
        ([ASKED, SAID | {"train_detail": [{"begin_offset": 0}]}], 'turn 2 .* has "train_detail", but a turn is'),
        ([ASKED | {"train": True}, SAID], "turn 1 .* is to be trained, but only the assistant's turns"),
        ([ASKED, SAID | {"weight": 0}], 'every answer in "messages" is marked as not to be trained'),
        ([ASKED | {"images": ["a.png"]}, SAID], 'turn 1 .* has "images", but this model reads text alone'),
        ([ASKED, SAID | {"audio": {"id": "x"}}], 'turn 2 .* has "audio"'),
        ([ASKED | {"content": [{"type": "image_url", "image_url": "x"}]}, SAID], 'turn 1 .* the kind "image_url"'),
        ([ASKED | {"content": [{"type": "text", "text": 3}]}, SAID], "turn 1 .* but it has the part"),
        ([ASKED | {"content": [{"type": ["text"]}]}, SAID], "turn 1 .* of the kind"),
        ([ASKED, SAID | {"content": " "}, ASKED, SAID], 'answer 1 of 2 in "messages" is empty'),
        ([ASKED, SAID | {"content": "<think>b</think>5", "thinking": "a"}], "turn 2 .* has reasoning of its own and"),
        ([ASKED, SAID | {"thinking": 3}], 'turn 2 .* has "thinking", which must be text, but is 3'),
        ([ASKED, SAID | {"tool_calls": [CALL], "function_call": CALL}], 'turn 2 .* "tool_calls" and "function_call"'),
    ],
)
def test_what_cannot_be_learned_as_it_is_meant_is_refused(turns, message):
    with pytest.raises(BadRecord, match=message):
        as_conversation({"messages": turns})


def test_an_empty_turn_that_is_not_trained_is_context():
    assert as_conversation({"messages": [ASKED, SAID | {"content": "", "weight": 0}, ASKED, SAID]}).untrained == {1}


def test_pairs_are_compared_by_their_whole_answers():
    pair = {"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID | {"content": "six"}]}
    assert as_preference(pair).prompt == (ASKED,)
    with pytest.raises(BadRecord, match='"rejected" has a turn not to be trained'):
        as_preference(pair | {"rejected": [SAID | {"weight": 0}]})
    with pytest.raises(BadRecord, match='a turn of "chosen" is empty'):
        as_preference(pair | {"chosen": [SAID | {"content": ""}, ASKED, SAID]})
    assert as_preference(pair | {"prompt": [ASKED | {"weight": 0}]}).prompt == (ASKED,)
