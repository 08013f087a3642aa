"""Models with DeepSeek's published head sizes, as transformers saves them, in every engine: transformers' own answers.

An engine that computes in fp32 gives its greedy tokens. One that knows bf16 alone gives its log-probabilities as
closely as transformers' own bf16 does; `published` says why rounding decides nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from model.convert.folder import describe
from ray_pipeline.cli import main
from ray_pipeline.data.chat.tokenizer import ChatTokenizer
from ray_pipeline.serving.environments import installed, way_to_add
from ray_pipeline.serving.vllm_engine import has_latent_sizes, unservable
from tests.serving.made_servers import serving, start
from tests.serving.published import ANSWER, V3, V32, Reference, references, save_published

pytestmark = pytest.mark.slow
PROMPTS = 4
TOP = 5  # likeliest tokens of a position that engines are asked for
EXACT = 1e-4  # nats: fp32 throughout, in another order
# llama.cpp keeps keys and values in fp16, and in a file of ours for serving the weights too.
HALF = 0.02


@dataclass(frozen=True)
class Published:
    """A saved model and what transformers makes of it."""

    folder: Path
    tokenizer: ChatTokenizer
    answers: list[Reference]


def made(tmp_path_factory, model_type: str, values: dict) -> Iterator[Published]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp(model_type)
        if installed("vllm") is None:  # else the engine lies in that cache
            patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        folder = root / "model"
        tokenizer = save_published(folder, model_type, values)
        yield Published(folder, tokenizer, references(folder, tokenizer, PROMPTS))


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    yield from made(tmp_path_factory, "deepseek_v3", V3)


@pytest.fixture(scope="module")
def v32(tmp_path_factory):
    yield from made(tmp_path_factory, "deepseek_v32", V32)


def gguf_of(model: Published) -> Path:
    """The folder as a GGUF file with all its 32 bits, by the verb."""
    path = model.folder.with_suffix(".gguf")
    if not path.exists():
        assert main(["convert", str(model.folder), str(path)]) == 0
    return path


def greedy(address: str, prompt: list[int]) -> str:
    body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=300).raise_for_status()
    return answer.json()["choices"][0]["text"]


def furthest(address: str, model: Published) -> float:
    """Largest |Δ log p| of the likeliest tokens, at every position of transformers' answers."""
    worst, seen = 0.0, 0
    for reference in model.answers:
        for i in range(ANSWER):
            body = {"prompt": reference.prompt + reference.answer[:i], "max_tokens": 1, "temperature": 0}
            answer = httpx.post(f"{address}/v1/completions", json=body | {"logprobs": TOP}, timeout=300)
            [told] = answer.raise_for_status().json()["choices"][0]["logprobs"]["top_logprobs"]
            for text, logprob in told.items():
                [token] = model.tokenizer.encode(text)
                worst, seen = max(worst, abs(logprob - float(reference.logprobs[i, token]))), seen + 1
    assert seen >= PROMPTS * ANSWER * TOP
    return worst


def answers_of(address: str, model: Published) -> list[tuple[str, str]]:
    """Theirs and transformers'."""
    return [(greedy(address, one.prompt), model.tokenizer.decode(one.answer)) for one in model.answers]


def test_the_models_have_the_published_heads_and_no_choice_of_a_router_is_close(v3, v32):
    """bf16 moves what a router chooses by less than a twentieth of what would change any choice."""
    for model, attention in ((v3, "mla"), (v32, "dsa")):
        config = describe(model.folder).config
        assert has_latent_sizes(config) and config.attention == attention
        assert min(reference.margin for reference in model.answers) > 0.05
    assert max(reference.moved for reference in v3.answers) < 0.05 / 20
    assert all(len(reference.prompt) > V32["index_topk"] for reference in v32.answers)


@pytest.mark.parametrize("name", ["v3", "v32"])
def test_native_gives_transformers_tokens_and_log_probabilities(name, request):
    model = request.getfixturevalue(name)
    with serving(start(model.folder, "native")) as address:
        assert all(theirs == expected for theirs, expected in answers_of(address, model))
        assert furthest(address, model) < EXACT


# From a folder it makes a file with weights in fp16, by which V3.2's indexer reads other tokens now and then.
@pytest.mark.parametrize(("name", "form"), [("v3", "folder"), ("v3", "gguf"), ("v32", "gguf")])
def test_llamacpp_gives_transformers_tokens_and_log_probabilities(name, form, request):
    pytest.importorskip("xllamacpp")
    model = request.getfixturevalue(name)
    with serving(start(model.folder if form == "folder" else gguf_of(model), "llamacpp")) as address:
        assert all(theirs == expected for theirs, expected in answers_of(address, model))
        assert furthest(address, model) < HALF


def test_vllm_gives_log_probabilities_within_bf16_rounding(v3):
    """Its log-probabilities are no further from fp32 than one and a half times what transformers' own bf16 is."""
    if installed("vllm") is None:
        pytest.skip(f"vLLM is not installed: {way_to_add('vllm')}")
    rounding = max(float((one.logprobs - one.rounded).abs().max()) for one in v3.answers)
    with serving(start(v3.folder, "vllm")) as address:
        assert furthest(address, v3) < 1.5 * rounding
        for theirs, expected in answers_of(address, v3):
            assert theirs[0] == expected[0]  # later tokens may part where two are as likely


def test_vllm_says_why_it_does_not_serve_sparse_attention_on_a_cpu(v32):
    config = describe(v32.folder).config
    assert unservable(config, has_gpu=False) == "vLLM has no sparse attention (attention=dsa) on CPUs"
