"""The native engine over HTTP: its answers are the decoder's, and official clients read them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from model.generate.decode import generate
from ray_pipeline.evaluation.model_source import describe_folder
from ray_pipeline.evaluation.models import LanguageModel, load
from ray_pipeline.serving.answer_parts import AnswerParts
from tests.evaluation.made_models import EXPORTABLE
from tests.serving.made_servers import save_model, serving, start

QUESTIONS = [f"What is {i} + {3 * i}?" for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "hf")


@pytest.fixture(scope="module")
def address(folder):
    with serving(start(folder, "native")) as url:
        yield url


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return load(describe_folder(folder))


@pytest.fixture
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def expected(model: LanguageModel, question: str, *, limit: int, temperature: float = 0.0, seed: int = 0) -> str:
    [answer] = generate(
        model.backend.decoder, [model.prompt(question)], max_new_tokens=limit, eos_ids=set(model.eos_ids),
        temperature=temperature, seeds=[seed],
    )  # fmt: skip
    tokens = answer.tokens[:-1] if answer.tokens[-1] in model.eos_ids else answer.tokens
    return model.tokenizer.decode(tokens)


def ask(client: openai.OpenAI, question: str, **settings):
    message = {"role": "user", "content": question}
    return client.chat.completions.create(model="hf", messages=[message], **settings)


def test_answers_to_clients_at_once_are_the_decoders_one_by_one(client, model):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda q: ask(client, q, max_tokens=40, temperature=0), QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        reasoning, content, _ = AnswerParts().whole(expected(model, question, limit=40))
        message = answer.choices[0].message
        assert (getattr(message, "reasoning_content", None), message.content) == (reasoning, content)


def test_streamed_samples_are_the_decoders_with_thinking_apart(client, model):
    thought = 0
    for seed in range(8):
        said = {"reasoning_content": "", "content": ""}
        finish = None
        for chunk in ask(client, "What is 4 + 3?", max_tokens=60, seed=seed, stream=True):
            delta = chunk.choices[0].delta
            said["content"] += delta.content or ""
            said["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            finish = chunk.choices[0].finish_reason or finish
        text = expected(model, "What is 4 + 3?", limit=60, temperature=1.0, seed=seed)
        reasoning, content, _ = AnswerParts().whole(text)
        assert said == {"reasoning_content": reasoning or "", "content": content}
        assert finish in ("stop", "length")
        thought += reasoning is not None
    assert thought, "the model of this test is to think now and then"


def test_usage_choices_and_log_probabilities(client):
    answer = ask(client, "x", max_tokens=5, temperature=0, n=2, logprobs=True, top_logprobs=3)
    assert len(answer.choices) == 2 and answer.choices[0].message == answer.choices[1].message
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    listed = answer.choices[0].logprobs.content
    assert 1 <= len(listed) <= 5 and all(len(one.top_logprobs) == 3 for one in listed)
    assert all(one.logprob == one.top_logprobs[0].logprob for one in listed)  # greedy
    chunks = list(ask(client, "x", max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens <= 5 and not chunks[-1].choices


def test_completions_stop_and_echo(client, model):
    whole = client.completions.create(model="hf", prompt="To be", max_tokens=20, temperature=0).choices[0].text
    assert len(whole) > 3
    stopped = client.completions.create(model="hf", prompt="To be", max_tokens=20, temperature=0, stop=whole[2:4])
    assert stopped.choices[0].text == whole[: whole.index(whole[2:4])]
    assert stopped.choices[0].finish_reason == "stop"
    stream = client.completions.create(model="hf", prompt="To be", max_tokens=20, temperature=0, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "To be" + whole


def test_a_prompt_over_the_context_is_refused_with_both_numbers(client):
    with pytest.raises(
        openai.BadRequestError, match=rf"has \d{{3}} tokens, .* context is {EXPORTABLE.max_position_embeddings}"
    ):
        ask(client, "abc " * 200)


ASKED = b'{"messages": [{"role": "user", "content": "a"}], '


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "body"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user", "content": 4}]}', "content"),
        (ASKED + b'"temprature": 1}', 'unknown field (did you mean "temperature"?)'),
        (ASKED + b'"temperature": "1"}', "temperature"),
        (ASKED + b'"temperature": NaN}', "temperature"),
        (b'{"messages": [{"role": "boss", "content": "a"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/x"}]}]}', "content"),
        (ASKED + b'"top_logprobs": 2}', "needs logprobs"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        (b"[" * 100000, ""),
        (b"\xff\xfe", ""),
    ],
)  # fmt: skip
def test_wrong_bodies_are_refused_in_openais_form(address, body, said):
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_models_health_and_unknown_things(address, client):
    assert [m.id for m in client.models.list()] == ["hf"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    with pytest.raises(openai.NotFoundError, match="hf is"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    for path in ("/etc/passwd", "/../pyproject.toml", "/v1/../../x", "/static/x"):
        assert httpx.get(address + path).status_code == 404
    assert httpx.put(f"{address}/v1/models").status_code == 405


def test_a_client_that_leaves_frees_its_slot(address):
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "temperature": 1}
    for _ in range(6):  # more than there are slots
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    for _ in range(200):
        if httpx.get(f"{address}/health").json()["writing"] == 0:
            return
    pytest.fail("slots are held for clients that left")
