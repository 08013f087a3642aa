"""Rollouts depend on weights, seed and step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.generate.decode import Decoder
from model.init import init_weights
from model.transformer import Transformer
from ray_pipeline.errors import UserError
from ray_pipeline.rollouts.sampler import request_seed, sample_groups

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
QUESTIONS = [{"prompt": p, "answer": "7"} for p in ("12", "345", "6", "9")]


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
def decoder() -> Decoder:
    model = Transformer(CONFIG)
    init_weights(model, CONFIG, seed=3)
    return Decoder(model)


def sample(decoder, questions=QUESTIONS, seed=1, step=2, **options):
    return sample_groups(decoder, Digits(), questions, 5, seed, step, max_new_tokens=10, **options)


def test_same_seed_and_step_give_the_same_rollouts(decoder):
    assert sample(decoder) == sample(decoder)
    assert sample(decoder) != sample(decoder, step=3) and sample(decoder) != sample(decoder, seed=2)


def test_a_slice_draws_what_the_whole_draws(decoder):
    whole = sample(decoder)
    parts = [*sample(decoder, QUESTIONS[1::2], indices=[1, 3]), *sample(decoder, QUESTIONS[::2], indices=[0, 2])]
    parts.sort(key=lambda r: r.question_index)
    for a, b in zip(whole, parts, strict=True):
        assert (a.question_index, a.completion_ids, a.reward, a.finished) == (
            b.question_index,
            b.completion_ids,
            b.reward,
            b.finished,
        )
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_groups_follow_the_questions_and_differ_inside(decoder):
    rollouts = sample(decoder)
    assert [r.question_index for r in rollouts] == [i for i in range(4) for _ in range(5)]
    assert [r.prompt_ids for r in rollouts[5:10]] == [[0, 5, 6, 7]] * 5
    assert len({tuple(r.completion_ids) for r in rollouts[:5]}) > 1
    assert all(r.finished == (r.completion_ids[-1] == 1) for r in rollouts)


def test_reward_is_the_weighted_sum_of_its_parts(decoder):
    many = sample_groups(
        decoder, Digits(), QUESTIONS, 100, 1, 2, max_new_tokens=4, weights={"answer": 2.0, "format": 0.5}
    )
    assert {r.parts["answer"] for r in many} == {0.0, 1.0}
    for rollout in many:
        assert rollout.reward == 2.0 * rollout.parts["answer"] + 0.5 * rollout.parts["format"]


def test_logprobs_are_of_the_sampling_policy(decoder):
    for rollout in sample(decoder, temperature=0.8)[:3]:
        ids = rollout.prompt_ids + rollout.completion_ids
        with torch.no_grad():
            logits = decoder.model(torch.tensor([ids]))[0, len(rollout.prompt_ids) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=1e-5, atol=1e-5)
        assert math.isfinite(sum(rollout.logprobs))


def test_a_think_budget_marks_the_tokens_it_forces(decoder):
    many = sample_groups(decoder, Digits(), QUESTIONS, 60, 1, 2, max_new_tokens=8, think_tokens=1)
    free = sample_groups(decoder, Digits(), QUESTIONS, 60, 1, 2, max_new_tokens=8)
    assert any(any(r.forced) for r in many) and not any(any(r.forced) for r in free)
    for rollout in many:
        marked = [token for token, forced in zip(rollout.completion_ids, rollout.forced, strict=True) if forced]
        assert marked == [13] * len(marked)
        opened = [i for i, token in enumerate(rollout.completion_ids[:-2]) if token == 12]
        if opened:
            assert 13 in rollout.completion_ids[opened[0] + 1 : opened[0] + 3] or 1 in rollout.completion_ids


def test_drafted_rollouts_are_of_the_same_policy(decoder):
    for rollout in sample(decoder, speculative=True):
        ids = rollout.prompt_ids + rollout.completion_ids
        with torch.no_grad():
            logits = decoder.model(torch.tensor([ids]))[0, len(rollout.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_reward_is_refused(decoder):
    with pytest.raises(UserError, match="reward 'style' is not known"):
        sample(decoder, weights={"style": 1.0})


@given(st.tuples(*[st.integers(0, 99)] * 4), st.tuples(*[st.integers(0, 99)] * 4))
def test_every_request_has_a_seed_of_its_own(a, b):
    assert (request_seed(*a) == request_seed(*b)) == (a == b)
    assert 0 <= request_seed(*a) < 2**63
