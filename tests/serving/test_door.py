"""The engine llama.cpp behind the front door: official clients, thinking apart, the native engine's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from ray_pipeline.data.chat.tokenizer import load_tokenizer
from tests.serving.made_servers import save_model, serving, start

pytest.importorskip("xllamacpp")

QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(8)]
HALF = "\ufffd"  # a byte of a letter, which random weights write: llama.cpp streams nothing from there on


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield save_model(tmp_path_factory.mktemp("served") / "hf")


@pytest.fixture(scope="module")
def door(folder):
    with serving(start(folder, "llamacpp")) as address:
        yield address


@pytest.fixture(scope="module")
def letters(folder) -> dict[str, Any]:
    """Of a request: no token that is less than a letter."""
    tokenizer = load_tokenizer(folder)
    return {"logit_bias": {str(i): -100 for i in range(320) if HALF in tokenizer.decode([i], keep_special=True)}}


def ask(address: str, question: str, **settings):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    message = {"role": "user", "content": question}
    return client.chat.completions.create(model="hf", messages=[message], **settings)


def parts(message) -> tuple[str, str]:
    return getattr(message, "reasoning_content", None) or "", message.content or ""


def joined(stream) -> tuple[str, str]:
    """Thinking and answer of a stream, whose first event says who speaks."""
    said, roles = {"reasoning_content": "", "content": ""}, []
    for chunk in stream:
        for choice in chunk.choices:
            roles.append(choice.delta.role)
            said["content"] += choice.delta.content or ""
            said["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
    assert roles[0] == "assistant"
    return said["reasoning_content"], said["content"]


def test_greedy_answers_are_the_native_engines(folder, door):
    """The file holds fp16: an answer may part from ours where two tokens are as likely, but most do not."""
    with serving(start(folder, "native")) as native:
        answers = [
            [parts(ask(address, q, max_tokens=16, temperature=0).choices[0].message) for q in QUESTIONS]
            for address in (door, native)
        ]
    same = sum(one == other for one, other in zip(*answers, strict=True))
    assert same >= 0.75 * len(QUESTIONS)


def test_a_stream_is_the_whole_answer_with_thinking_apart(door, letters):
    thought = 0
    for seed in range(12):
        settings = letters | {"max_tokens": 60, "seed": seed, "temperature": 1}
        thinking, answer = joined(ask(door, "What is 4 + 3?", stream=True, **settings))
        assert "<think>" not in answer and "</think>" not in thinking
        assert (thinking, answer) == parts(ask(door, "What is 4 + 3?", **settings).choices[0].message)
        thought += bool(thinking)
    assert thought, "the model of this test is to think now and then"


def test_anthropics_client_reads_thinking_and_text_streamed_and_whole(door):
    client = anthropic.Anthropic(base_url=door, api_key="none", max_retries=0)
    for question in QUESTIONS:
        asked: dict[str, Any] = {"model": "hf", "max_tokens": 40, "extra_body": {"temperature": 0}}
        asked["messages"] = [{"role": "user", "content": question}]
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        whole = client.messages.create(**asked)
        message = ask(door, question, max_tokens=40, temperature=0).choices[0].message
        for kind, expected in zip(("thinking", "text"), parts(message), strict=True):
            found, live = (
                "".join(getattr(block, kind) for block in reply.content if block.type == kind)
                for reply in (whole, streamed)
            )
            assert found == expected
            assert live.rstrip(HALF) == found.rstrip(HALF) or found.removeprefix(live).startswith(HALF)


def test_thinking_that_the_template_opens_is_no_answer(folder, tmp_path, letters):
    """As R1's own template does."""
    opened = tmp_path / "hf"
    opened.mkdir()
    for file in folder.iterdir():
        (opened / file.name).write_bytes(file.read_bytes())
    config = json.loads((opened / "tokenizer_config.json").read_text())
    before, mark, after = config["chat_template"].rpartition("<｜Assistant｜>")
    config["chat_template"] = f"{before}{mark}<think>\\n{after}"
    (opened / "tokenizer_config.json").write_text(json.dumps(config))
    with serving(start(opened, "llamacpp")) as address:
        whole = [ask(address, "What is 4 + 3?", max_tokens=60, seed=s, **letters).choices[0].message for s in range(12)]
        assert all(parts(message)[0] for message in whole)
        assert any(parts(message)[1] for message in whole), "the model of this test is to answer now and then"
        for seed, message in enumerate(whole):
            assert joined(ask(address, "What is 4 + 3?", max_tokens=60, seed=seed, stream=True, **letters)) == parts(
                message
            )


def test_responses_have_thinking_as_an_item_of_its_own_streamed_and_whole(door, letters):
    client = openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0)
    thought = 0
    for seed in range(12):
        asked: dict[str, Any] = {"model": "hf", "input": "What is 4 + 3?", "max_output_tokens": 60, "temperature": 1}
        asked["extra_body"] = letters | {"seed": seed}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            events = list(stream)
            final = stream.get_final_response()
        message = ask(door, "What is 4 + 3?", max_tokens=60, temperature=1, seed=seed, **letters).choices[0].message
        for reply in (whole, final):
            texts = {item.type: "".join(part.text for part in item.content) for item in reply.output}
            assert (texts.get("reasoning", ""), texts.get("message", "")) == parts(message)
        kinds = {"response.reasoning_text.delta": 0, "response.output_text.delta": 1}
        said = ["", ""]
        for event in events:
            if event.type in kinds:
                said[kinds[event.type]] += event.delta
        assert tuple(said) == parts(message)
        thought += "reasoning" in {item.type for item in whole.output}
    assert thought, "the model of this test is to think now and then"


def test_several_answers_are_those_of_their_seeds_and_all_their_tokens_count(door, letters):
    settings = letters | {"max_tokens": 7, "temperature": 1}
    alone = [ask(door, "What is 4 + 3?", seed=5 + i, **settings) for i in range(3)]
    whole = ask(door, "What is 4 + 3?", seed=5, n=3, **settings)
    assert [parts(c.message) for c in whole.choices] == [parts(a.choices[0].message) for a in alone]
    assert whole.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    said = ["", "", ""]
    counted = []
    for chunk in ask(
        door, "What is 4 + 3?", seed=5, n=3, stream=True, stream_options={"include_usage": True}, **settings
    ):
        counted += [chunk.usage.completion_tokens] if chunk.usage else []
        for choice in chunk.choices:
            said[choice.index] += (choice.delta.content or "") + (getattr(choice.delta, "reasoning_content", "") or "")
    assert said == ["".join(parts(choice.message)) for choice in whole.choices]
    assert counted == [whole.usage.completion_tokens]
    client = openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0)
    assert len(client.completions.create(model="hf", prompt="To be", max_tokens=3, n=2).choices) == 2
    with pytest.raises(openai.BadRequestError, match="from 1 to 16"):
        ask(door, "x", n=99)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("responses", {"input": 4}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [4]}),
        *[
            (path, {"messages": turns, "max_tokens": 4})
            for path in ("chat/completions", "messages", "messages/count_tokens")
            for turns in ([4], [], None, [{"content": "x"}], [{"role": "user", "content": "x"}, {"role": 4}])
        ],
    ],
)
def test_fields_of_the_wrong_type_are_refused(door, path, body):
    answer = httpx.post(f"{door}/v1/{path}", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_stream_of_messages_tells_the_tokens_of_its_prompt(door):
    body = {"model": "hf", "max_tokens": 4, "messages": [{"role": "user", "content": "What is 4 + 3?"}]}
    counted = httpx.post(f"{door}/v1/messages/count_tokens", json=body).json()["input_tokens"]
    client = anthropic.Anthropic(base_url=door, api_key="none", max_retries=0)
    for seed in range(6):  # llama.cpp omits the beginning of some of them
        with client.messages.stream(**body, extra_body={"seed": seed}) as stream:
            usage = stream.get_final_message().usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted > 0


def test_an_answer_of_half_a_letter_alone_is_an_empty_message(door):
    """Of which llama.cpp streams the end alone."""
    client = anthropic.Anthropic(base_url=door, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "hf", "max_tokens": 1}
    asked["messages"] = [{"role": "user", "content": "What is 4 + 3?"}]
    for _ in range(100):  # about every third of this model's tokens is less than a letter; this API knows no seed
        with client.messages.stream(**asked) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 1
        if not message.content:
            return
    raise AssertionError("the model of this test is to say half a letter now and then")


def test_completions_have_log_probabilities_in_their_own_form(door):
    client = openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0)
    choice = client.completions.create(model="hf", prompt="To be", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs) > 0
    assert "".join(choice.logprobs.tokens) == choice.text


def test_a_prompt_over_the_context_and_another_model_are_refused(door):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(door, "abc " * 200)
    assert caught.value.code == "context_length_exceeded"
    client = openai.OpenAI(base_url=f"{door}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="hf is"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": NaN}', b"[" * 100000])
def test_what_is_no_json_object_is_refused(door, body):
    for path in ("chat/completions", "messages", "completions"):
        answer = httpx.post(f"{door}/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_health_models_and_only_the_listed_paths(door):
    assert httpx.get(f"{door}/health").json() == {"status": "ok", "engine": "llamacpp"}
    assert [m["id"] for m in httpx.get(f"{door}/v1/models").json()["data"]] == ["hf"]
    assert "llamacpp" in httpx.get(f"{door}/metrics").text
    for path in ("/props", "/slots", "/lora-adapters"):
        assert httpx.get(door + path).status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
@pytest.mark.parametrize("odd", [rb'"\ud800"', b"1e999"])
def test_what_no_json_text_can_hold_is_refused(door, path, odd):
    body = b'{"max_tokens": 4, "messages": [{"role": "user", "content": "x"}], "content": %s}' % odd
    answer = httpx.post(f"{door}{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
