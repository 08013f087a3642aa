"""Conversations that cannot be trained are refused by name, before training and where possible before anything."""

from __future__ import annotations

import json

import pytest

from ray_pipeline.data.chat.chat import Chat
from ray_pipeline.data.chat.chat_templates import DEEPSEEK_TEMPLATE
from ray_pipeline.data.chat.tokenizer import load_tokenizer
from ray_pipeline.data.chat.tokenizer_files import save_trained, train_bpe
from ray_pipeline.data.files.reading import Tally
from ray_pipeline.data.rows import conversations
from ray_pipeline.data.rows.conversations import Encoder
from ray_pipeline.data.sources.source_checks import check_sources
from ray_pipeline.data.text.builtin_text import document_at
from ray_pipeline.errors import UserError
from ray_pipeline.settings.schema import DataConfig, PipelineFields, TokenizerConfig

PLAIN = {"prompt": "2+2?", "response": "4"}
THOUGHT = {"prompt": "2+3?", "response": "<think>2+3=5</think>5"}
CALLED = {
    "conversations": [
        {"from": "human", "value": "2+4?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 4}}'},
        {"from": "observation", "value": "6"},
        {"from": "gpt", "value": "6"},
    ],
    "tools": '[{"name": "add"}]',
}
# As DeepSeek-R1's: what was thought is cut from answers.
DROPS_THINKING = DEEPSEEK_TEMPLATE.replace("message['content'] + eos", "message['content'].split('</think>')[-1] + eos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_trained(train_bpe([document_at(0, index) for index in range(100)], 320), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": DROPS_THINKING}))
    return path


def chat(question, answer):
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def silent(*_):
    """No progress."""


def test_all_conversations_that_cannot_be_trained_are_told_at_once_by_kind(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    chats = [chat(f"question {i}?", "yes") for i in range(7)]
    chats[3] = chat("a question that goes on for more than forty letters?", "<think>a</think>b")
    chats[4] = chat("nothing here is the assistant's", "b")._replace(trained_from=2)
    chats[6] = chat("another thought?", "<think>a</think>b")
    monkeypatch.setattr(conversations, "CHUNK", 2)
    with pytest.raises(UserError) as error:
        Encoder(tokenizer, silent, "phase", "here").whole(chats)
    message = str(error.value)
    assert message.startswith('here: conversation 4 ("a question that goes on for more than fo"): the chat templ')
    assert '(2 like it: conversation 4 ("' in message and 'conversation 7 ("another thought?"))' in message
    assert 'conversation 5 ("nothing here is the assistant\'s"): no token of it would be trained' in message
    assert "In all 3 of 7 records looked at cannot be used." in message
    assert len(Encoder(tokenizer, silent, "phase", "here").whole(chats[:3])) == 3


def test_conversations_that_cannot_be_trained_are_left_out_where_that_is_asked_for(folder, monkeypatch):
    tokenizer, tally = load_tokenizer(folder), Tally(skip=True, most=0.5, records=5)
    chats = [chat(f"question {i}?", "yes") for i in range(5)]
    chats[3] = chat("why?", "<think>a</think>b")
    chats[4] = chat("and?", "b")._replace(trained_from=2)
    monkeypatch.setattr(conversations, "CHUNK", 2)
    encoded = Encoder(tokenizer, silent, "phase", "here", tally).whole(chats)
    assert [bool(ids) for ids, _ in encoded] == [True, True, True, False, False]
    dropped, untrained = tally.bad.values()
    assert (dropped.count, dropped.places) == (1, ['conversation 4 ("why?")']) and "drops <think>" in dropped.example
    assert untrained.places == ['conversation 5 ("and?")'] and untrained.example.startswith("no token of it would be")


@pytest.mark.parametrize(
    ("records", "tokenizer", "message"),
    [
        ([PLAIN, THOUGHT], "folder", r"^--sft-data .*sft\.jsonl: conversation 2: the chat template drops <think>"),
        ([PLAIN, PLAIN, CALLED], "folder", r"^--sft-data .*sft\.jsonl: conversation 3: the chat template .*tool calls"),
        ([PLAIN, CALLED], "train", r"^--sft-data .*conversation 2: the chat template .*--set tokenizer\.tools=true"),
        ([PLAIN, PLAIN], "folder", None),
        ([PLAIN, THOUGHT], "train", None),
    ],
)
def test_a_template_is_held_against_the_data_before_anything_starts(folder, tmp_path, records, tokenizer, message):
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    name = str(folder) if tokenizer == "folder" else tokenizer
    config = PipelineFields(data=DataConfig(sft=str(path)), tokenizer=TokenizerConfig(name=name))
    if message is None:
        check_sources(config)
    else:
        with pytest.raises(UserError, match=message):
            check_sources(config)


def test_tools_of_a_trained_tokenizer_carry_tool_conversations(tmp_path):
    path = tmp_path / "sft.json"
    path.write_text(json.dumps([PLAIN, THOUGHT, CALLED]))
    check_sources(PipelineFields(data=DataConfig(sft=str(path)), tokenizer=TokenizerConfig(tools=True)))
