"""Decoding with a cache gives what the uncached model gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RopeScaling
from model.generate.decode import Decoder, generate
from model.generate.stopping import StopStrings, ThinkBudget
from model.init import init_weights
from model.transformer import Transformer
from tests.model.generate.models import PROMPTS, TINY, build, greedy_uncached

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16)
VARIANTS = {
    "merged": TINY,
    "q_lora_none": dataclasses.replace(TINY, q_lora_rank=None),
    "wide_latent": dataclasses.replace(TINY, kv_lora_rank=24),
    "odd_widths": dataclasses.replace(TINY, kv_lora_rank=15, qk_nope_head_dim=7, v_head_dim=5),
    "groups_yarn_no_shared": dataclasses.replace(
        TINY, n_group=4, topk_group=2, n_shared_experts=0, routed_scaling_factor=2.5, rope_scaling=YARN
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copies", [1, 10])  # 50 rows take the sorted experts' path, 5 the dense one
def test_cached_logits_equal_uncached_logits(variant, copies):
    model = build(VARIANTS[variant])
    decoder = Decoder(model)
    prompts = PROMPTS * copies
    logits, cache = decoder.prefill(prompts, capacity=9)
    rows = [list(p) for p in prompts]
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        for row, got in zip(rows[:5], logits, strict=False):
            with torch.no_grad():
                expected = model(torch.tensor([row]))[0, -1]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        tokens = torch.randint(0, 48, (len(rows),), generator=generator)
        logits = decoder.step(tokens, cache)
        rows = [row + [int(t)] for row, t in zip(rows, tokens, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_uncached(variant):
    model = build(VARIANTS[variant])
    out = generate(Decoder(model), PROMPTS, max_new_tokens=20, eos_ids=set(), temperature=0)
    for prompt, completion in zip(PROMPTS, out, strict=True):
        assert completion.tokens == greedy_uncached(model, prompt, 20)
        assert not completion.finished


def test_refresh_takes_up_changed_weights():
    model = build(TINY)
    decoder = Decoder(model)
    before = generate(decoder, PROMPTS, max_new_tokens=8, eos_ids=set(), temperature=0)
    init_weights(model, TINY, seed=9)
    decoder.refresh()
    after = generate(decoder, PROMPTS, max_new_tokens=8, eos_ids=set(), temperature=0)
    assert before != after
    assert [c.tokens for c in after] == [greedy_uncached(model, p, 8) for p in PROMPTS]


def test_stops_at_the_first_end_token_and_keeps_it():
    model = build(TINY)
    plain = generate(Decoder(model), PROMPTS, max_new_tokens=30, eos_ids=set(), seeds=[3, 1, 4, 1, 5])
    eos = {plain[0].tokens[4], plain[2].tokens[11]}
    stopped = generate(Decoder(model), PROMPTS, max_new_tokens=30, eos_ids=eos, seeds=[3, 1, 4, 1, 5])
    for full, short in zip(plain, stopped, strict=True):
        ends = [i for i, token in enumerate(full.tokens) if token in eos]
        length = ends[0] + 1 if ends else 30
        assert short.tokens == full.tokens[:length]
        assert short.finished == bool(ends)
        assert short.logprobs == pytest.approx(full.logprobs[:length], abs=1e-5)
    assert any(c.finished for c in stopped)


def test_logprobs_are_the_models_at_the_temperature_before_top_k():
    model = build(TINY)
    prompt = [1, 2, 3]
    [c] = generate(
        Decoder(model), [prompt], max_new_tokens=12, eos_ids=set(), temperature=0.7, top_k=5, top_p=0.9, seeds=[4]
    )
    with torch.no_grad():
        logits = model(torch.tensor([prompt + c.tokens]))[0, len(prompt) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor(c.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=1e-5, atol=1e-5)
    assert bool((logits.argsort(-1, descending=True)[:, :5] == torch.tensor(c.tokens)[:, None]).any(-1).all())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2**63 - 1)), min_size=1, max_size=9), st.integers(1, 4))
def test_a_request_draws_the_same_whatever_else_is_in_the_batch(requests, max_batch):
    decoder = Decoder(SHARED)
    prompts, seeds = [PROMPTS[i] for i, _ in requests], [seed for _, seed in requests]
    together = generate(decoder, prompts, max_new_tokens=6, eos_ids={7, 8, 9}, seeds=seeds, max_batch=max_batch)
    for prompt, seed, completion in zip(prompts, seeds, together, strict=True):
        [alone] = generate(decoder, [prompt], max_new_tokens=6, eos_ids={7, 8, 9}, seeds=[seed])
        assert (completion.tokens, completion.finished) == (alone.tokens, alone.finished)


SHARED = build(TINY)


def test_generation_stops_at_the_end_of_the_context():
    prompts = [[1] * 60, [2] * 10]
    out = generate(Decoder(SHARED), prompts, max_new_tokens=40, eos_ids=set(), temperature=0)
    assert [len(c.tokens) for c in out] == [4, 40]
    assert out[0].tokens == greedy_uncached(SHARED, prompts[0], 4)
    assert out[1].tokens == greedy_uncached(SHARED, prompts[1], 40)


def test_on_token_sees_every_token_in_order():
    seen: dict[int, list[int]] = {}
    out = generate(
        Decoder(SHARED), PROMPTS, max_new_tokens=9, eos_ids={5, 6, 7, 8, 9, 10}, max_batch=2,
        on_token=lambda i, token: seen.setdefault(i, []).append(token),
    )  # fmt: skip
    assert [seen[i] for i in range(len(PROMPTS))] == [c.tokens for c in out]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuv"


def spell(tokens: list[int]) -> str:
    return "".join(LETTERS[t] for t in tokens)


def test_a_stop_string_ends_the_answer_where_it_is_complete():
    decoder = Decoder(SHARED)
    free = generate(decoder, PROMPTS, max_new_tokens=30, eos_ids={7}, seeds=[3, 1, 4, 1, 5])
    stop = StopStrings((spell(free[0].tokens[4:7]), spell(free[2].tokens[9:10])), spell)
    out = generate(decoder, PROMPTS, max_new_tokens=30, eos_ids={7}, seeds=[3, 1, 4, 1, 5], stop=stop)
    for full, short in zip(free, out, strict=True):
        text = spell([t for t in full.tokens if t != 7])
        met = [(text.index(s) + len(s), text.index(s)) for s in stop.strings if s in text]
        end, cut = min(met, default=(len(text), len(text)))
        assert short.text == text[:cut]
        assert short.tokens == (full.tokens[:end] if met else full.tokens)
        assert short.finished == (bool(met) or full.finished)
        assert len(short.tokens) == len(short.logprobs) == len(short.forced)
    assert sum(a.tokens != b.tokens for a, b in zip(free, out, strict=True)) >= 2


def test_without_stop_strings_there_is_no_text():
    assert generate(Decoder(SHARED), [[1]], max_new_tokens=3, eos_ids=set())[0].text is None


def test_a_spent_think_budget_forces_the_end_of_thinking():
    decoder, opening, closing = Decoder(SHARED), 40, (41, 42)
    prompts = [[1, 2, opening], [1, 2]]
    free = generate(decoder, prompts, max_new_tokens=12, eos_ids=set(), seeds=[3, 4])
    budget = ThinkBudget(5, (opening,), closing)
    out = generate(decoder, prompts, max_new_tokens=12, eos_ids=set(), seeds=[3, 4], think=budget)
    assert opening not in free[1].tokens and out[1].tokens == free[1].tokens and not any(out[1].forced)
    assert out[0].tokens[:7] == free[0].tokens[:5] + list(closing)
    assert out[0].forced == [False] * 5 + [True] * 2 + [False] * 5
    row = torch.tensor([prompts[0] + out[0].tokens])
    with torch.no_grad():
        expected = SHARED(row)[0, 2:-1].log_softmax(-1).gather(1, row[0, 3:, None])[:, 0]
    # A forced token still has the probability that the model gave it.
    torch.testing.assert_close(torch.tensor(out[0].logprobs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_think_budget_holds_for_thinking_that_the_model_begins(tokens):
    free = generate(Decoder(SHARED), PROMPTS, max_new_tokens=12, eos_ids=set(), temperature=0)
    opening = free[0].tokens[3]
    budget = ThinkBudget(tokens, (opening,), (47,))
    out = generate(Decoder(SHARED), PROMPTS, max_new_tokens=12, eos_ids=set(), temperature=0, think=budget)
    begin = free[0].tokens.index(opening)
    assert out[0].tokens[: begin + 1 + tokens] == free[0].tokens[: begin + 1 + tokens]
    assert out[0].tokens[begin + 1 + tokens] == 47 and out[0].forced[begin + 1 + tokens]


@torch.no_grad()
def test_a_repetition_penalty_counts_prompt_and_answer():
    penalty, row = 1.8, [1, 2, 3]
    [c] = generate(Decoder(SHARED), [row], max_new_tokens=20, eos_ids=set(), temperature=0, repetition_penalty=penalty)
    for token, logprob in zip(c.tokens, c.logprobs, strict=True):
        logits = SHARED(torch.tensor([row]))[0, -1]
        punished = logits.clone()
        for seen in set(row):
            punished[seen] = logits[seen] * penalty if logits[seen] < 0 else logits[seen] / penalty
        assert int(punished.argmax()) == token
        assert float(logits.log_softmax(-1)[token]) == pytest.approx(logprob, abs=1e-4)  # the model's own
        row = [*row, token]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 64], {}, "prompt 0 has 64 tokens: the context of 64 leaves no room"),
        ([[1, 48]], {}, "token ids from 1 to 48: the vocabulary has 48"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"max_batch": 0}, "max_batch=0"),
        ([[1]], {"think": ThinkBudget(3, (48,), (1,))}, "the vocabulary has 48 tokens; give the ids of this model"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_impossible_requests_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(Decoder(SHARED), prompts, **({"max_new_tokens": 4, "eos_ids": set()} | options))


def test_no_prompts_give_no_completions():
    assert generate(Decoder(SHARED), [], max_new_tokens=4, eos_ids=set()) == []


def test_a_pipeline_stage_cannot_decode():
    with pytest.raises(ValueError, match="whole model"):
        Decoder(Transformer(TINY, range(2)))


def test_weights_in_bfloat16_decode_close_to_fp32():
    model = build(TINY)
    exact, _ = Decoder(model).prefill(PROMPTS, 1)
    logits, cache = Decoder(model.bfloat16()).prefill(PROMPTS, 1)
    logits = Decoder(model).step(logits.argmax(-1), cache)
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all()) and exact.shape == logits.shape
