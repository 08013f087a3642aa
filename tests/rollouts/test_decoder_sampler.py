"""What a sampler answers depends on its weights and each request's seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.generate.decode import Completion, Decoder
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.rollouts.decoder_sampler import DecoderSampler, SamplingRules
from ray_pipeline.rollouts.rollout import SampleRequest, request_seed

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    max_position_embeddings=24,
    initializer_range=0.3,
)
PROMPTS = [[0, 3, 4], [0, 5, 6, 7], [0, 8], [0, 11]]


class Digits:
    """Ids 2..11 are digits, 12 and 13 the thinking marks; 0 starts, 1 ends."""

    eos_id = 1

    def encode_prompt(self, question: str, tools: Sequence[object] = (), /) -> list[int]:
        return [0, *(2 + int(c) for c in question)]

    def encode(self, text: str, /) -> list[int]:
        return [{"<think>": 12, "</think>": 13}[text]]

    def decode(self, ids: list[int], /) -> str:
        names = {12: "<think>", 13: "</think>"} | {2 + d: str(d) for d in range(10)}
        return "".join(names.get(i, " ") for i in ids)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG).eval().requires_grad_(False)
    init_weights(model, CONFIG, seed=3)
    return model


def requests(seed: int = 1, step: int = 2, group: int = 5) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, request_seed(seed, step, i, sample))
        for i, prompt in enumerate(PROMPTS)
        for sample in range(group)
    ]


def sample(model: Transformer, asked: Sequence[SampleRequest], **rules: Any) -> list[Completion]:
    tokenizer: Any = Digits()
    return DecoderSampler(Decoder(model), tokenizer, SamplingRules(**{"max_new_tokens": 10} | rules)).sample(asked)


def logprobs(model: Transformer, asked: SampleRequest, answer: Completion, temperature: float) -> torch.Tensor:
    """Of the answer's tokens, by the whole model at once."""
    ids = torch.tensor([asked.prompt + answer.tokens])
    logits = model(ids)[0, len(asked.prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]


def test_same_seeds_give_the_same_answers(model):
    assert sample(model, requests()) == sample(model, requests())
    assert sample(model, requests()) != sample(model, requests(step=3))
    assert sample(model, requests()) != sample(model, requests(seed=2))


def test_a_slice_draws_what_the_whole_draws(model):
    asked = requests()
    whole = sample(model, asked)
    parts: list[Completion] = [*whole]
    parts[1::2], parts[::2] = sample(model, asked[1::2]), sample(model, asked[::2])
    for a, b in zip(whole, parts, strict=True):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_answers_of_a_group_differ_and_say_whether_they_ended(model):
    answers = sample(model, requests())
    assert len({tuple(a.tokens) for a in answers[:5]}) > 1
    assert {a.finished for a in answers} == {True, False}
    assert all(a.finished == (a.tokens[-1] == Digits.eos_id) for a in answers)


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.8}, {"speculative": True}], ids=str)
def test_logprobs_are_of_the_sampling_policy(model, rules):
    asked = requests()
    for request, answer in zip(asked, sample(model, asked, **rules), strict=True):
        expected = logprobs(model, request, answer, rules.get("temperature", 1.0))
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=1e-5, atol=1e-5)


def test_a_think_budget_marks_the_tokens_it_forces(model):
    many = sample(model, requests(group=60), max_new_tokens=8, think_tokens=1)
    free = sample(model, requests(group=60), max_new_tokens=8)
    assert any(any(answer.forced) for answer in many) and not any(any(answer.forced) for answer in free)
    for answer in many:
        marked = [token for token, forced in zip(answer.tokens, answer.forced, strict=False) if forced]
        assert marked == [13] * len(marked)
        opened = [i for i, token in enumerate(answer.tokens[:-2]) if token == 12]
        if opened:
            assert 13 in answer.tokens[opened[0] + 1 : opened[0] + 3] or Digits.eos_id in answer.tokens


@given(st.tuples(*[st.integers(0, 99)] * 4), st.tuples(*[st.integers(0, 99)] * 4))
def test_every_request_has_a_seed_of_its_own(a, b):
    assert (request_seed(*a) == request_seed(*b)) == (a == b)
    assert 0 <= request_seed(*a) < 2**63
