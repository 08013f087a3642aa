"""Speculative decoding changes how fast an answer comes, not what it is."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate.decode import Decoder, generate
from model.generate.sampler import Sampling, distributions
from model.generate.speculative import verify
from model.generate.stopping import StopStrings, ThinkBudget
from model.init import init_weights
from tests.model.generate.models import KINDS, PROMPTS, TINY, build, build_agreeing, greedy_uncached


@pytest.mark.parametrize(("kind", "depth"), [*((kind, depth) for kind in KINDS for depth in (1, 2)), ("mla", 3)])
def test_greedy_tokens_are_those_without_drafts(kind, depth):
    model = build_agreeing(dataclasses.replace(KINDS[kind], num_nextn_predict_layers=depth))
    decoder = Decoder(model)
    options = {"max_new_tokens": 24, "eos_ids": {7, 8}, "temperature": 0}
    plain = generate(decoder, PROMPTS, **options)
    fast = generate(decoder, PROMPTS, **options, speculative=True)
    for expected, got in zip(plain, fast, strict=True):
        assert (got.tokens, got.finished, got.forced) == (expected.tokens, expected.finished, expected.forced)
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    drafted, accepted = sum(c.drafted for c in fast), sum(c.accepted for c in fast)
    assert accepted < drafted and (accepted > 0 or kind in ("dyt", "recursion"))


def test_greedy_tokens_are_those_of_the_uncached_model_up_to_the_end_of_the_context():
    model = build_agreeing(dataclasses.replace(TINY, num_nextn_predict_layers=2))
    prompts = [[1] * 61, [2] * 40, [3]]
    out = generate(Decoder(model), prompts, max_new_tokens=30, eos_ids=set(), temperature=0, speculative=True)
    assert [len(c.tokens) for c in out] == [3, 24, 30]
    for prompt, completion in zip(prompts, out, strict=True):
        assert completion.tokens == greedy_uncached(model, prompt, len(completion.tokens))


shares = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.01)


@settings(max_examples=25, deadline=None)
@given(shares, shares)
def test_what_verification_lets_through_is_distributed_as_the_target(p, q):
    p, q = (torch.tensor(x, dtype=torch.float64) / sum(x) for x in (p, q))
    points = 64  # of the unit interval, for each of the two numbers
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    accept, replace = torch.meshgrid(grid, grid, indexing="ij")
    uniforms = torch.stack([torch.zeros(points**2), accept.flatten(), replace.flatten()], 1).double()
    result = torch.zeros(4, dtype=torch.float64)
    kept_mass = 0.0
    for token in range(4):
        if q[token] == 0:
            continue
        rows = torch.full((points**2,), token)
        # Logs that are not normalised are allowed.
        tokens, kept = verify(*(x.log().expand(points**2, -1) + 3 for x in (p, q)), rows, uniforms)
        result += q[token] * torch.bincount(tokens, minlength=4) / points**2
        kept_mass += float(q[token] * kept.double().mean())
        assert bool((tokens[kept] == token).all())
    torch.testing.assert_close(result, p, atol=4 / points, rtol=0)
    assert kept_mass == pytest.approx(float(torch.minimum(p, q).sum()), abs=4 / points)


SMALL = dataclasses.replace(TINY, vocab_size=6, num_nextn_predict_layers=2, initializer_range=0.35)
SAMPLED = {
    "plain": {"temperature": 1.3},
    "cut": {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.02},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
}


def answer_probabilities(model, prompt: list[int], sampling: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """Of every answer of `length` tokens, exactly: a product over the uncached model's distributions."""
    known = {(): 1.0}
    for _ in range(length):
        rows = torch.tensor([prompt + list(answer) for answer in known])
        seen = torch.zeros(len(rows), 6, dtype=torch.bool).scatter_(1, rows, True)
        with torch.no_grad():
            _, kept = distributions(model(rows)[:, -1], sampling, seen)
        following = kept.double().softmax(-1).tolist()
        known = {(*a, t): p * q[t] for (a, p), q in zip(known.items(), following, strict=True) for t in range(6)}
    return known


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_answers_have_the_models_distribution(name):
    """Chi-square of all answers of three tokens against their exact probabilities."""
    model, prompt, count = build_agreeing(SMALL), [1, 2], 12000
    out = generate(
        Decoder(model), [prompt] * count, max_new_tokens=3, eos_ids=set(), speculative=True, max_batch=4000,
        **SAMPLED[name],
    )  # fmt: skip
    assert 0.2 < sum(c.accepted for c in out) / sum(c.drafted for c in out) < 0.98
    probability = answer_probabilities(model, prompt, Sampling(**SAMPLED[name]), 3)
    seen = Counter(tuple(c.tokens) for c in out)
    assert all(probability[answer] > 0 for answer in seen)
    # Answers that are expected less than five times are counted as one.
    pairs = [(seen[a], p * count) for a, p in probability.items() if p * count >= 5]
    rest = count - sum(n for n, _ in pairs), count - sum(expected for _, expected in pairs)
    pairs += [rest] if rest[1] >= 5 else []
    chi_square = sum((n - expected) ** 2 / expected for n, expected in pairs)
    freedom = len(pairs) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_a_request_draws_the_same_whatever_else_is_in_the_batch():
    decoder = Decoder(build_agreeing(dataclasses.replace(TINY, num_nextn_predict_layers=2)))
    options = {"max_new_tokens": 15, "eos_ids": {7, 8, 9}, "speculative": True}
    seeds = [3, 1, 4, 1, 5]
    together = generate(decoder, PROMPTS, seeds=seeds, **options)
    for prompt, seed, completion in zip(PROMPTS, seeds, together, strict=True):
        [alone] = generate(decoder, [prompt], seeds=[seed], **options)
        assert (completion.tokens, completion.finished, completion.accepted, completion.drafted) == (
            alone.tokens, alone.finished, alone.accepted, alone.drafted,
        )  # fmt: skip


def test_a_perfect_draft_is_always_accepted():
    config = dataclasses.replace(TINY, num_nextn_predict_layers=2)
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:  # every block passes its input on
                parameter.zero_()
            if name.endswith("eh_proj.weight"):
                parameter.copy_(torch.eye(32, 64))
    out = generate(Decoder(model), [[1, 2, 3]], max_new_tokens=31, eos_ids=set(), seeds=[5], speculative=True)
    assert out[0].drafted == out[0].accepted == 20  # the first token, then ten rounds of two drafts and one more


def test_stop_strings_penalty_and_think_budget_hold_for_drafts_too():
    decoder = Decoder(build_agreeing(dataclasses.replace(TINY, num_nextn_predict_layers=2)))
    letters = "".join(chr(ord("A") + i) for i in range(48))
    free = generate(decoder, PROMPTS, max_new_tokens=25, eos_ids=set(), temperature=0)
    text = "".join(letters[t] for t in free[0].tokens)
    options = {
        "max_new_tokens": 25, "eos_ids": {7}, "temperature": 0, "repetition_penalty": 1.2,
        "stop": StopStrings((text[3:5], "AB"), lambda ids: "".join(letters[t] for t in ids)),
        "think": ThinkBudget(4, (free[2].tokens[0],), (40, 41)),
    }  # fmt: skip
    plain, fast = generate(decoder, PROMPTS, **options), generate(decoder, PROMPTS, **options, speculative=True)
    for expected, got in zip(plain, fast, strict=True):
        assert (got.tokens, got.finished, got.forced, got.text) == (
            expected.tokens, expected.finished, expected.forced, expected.text,
        )  # fmt: skip
    assert any(any(c.forced) for c in fast)


def test_refresh_takes_up_changed_mtp_modules():
    config = dataclasses.replace(TINY, num_nextn_predict_layers=1)
    model = build_agreeing(config)
    decoder = Decoder(model)
    options = {"max_new_tokens": 20, "eos_ids": set(), "temperature": 0, "speculative": True}
    before = generate(decoder, PROMPTS, **options)
    init_weights(model, config, seed=9)
    decoder.refresh()
    after = generate(decoder, PROMPTS, **options)
    fresh = generate(Decoder(model), PROMPTS, **options)
    assert [c.accepted for c in after] == [c.accepted for c in fresh] != [c.accepted for c in before]
    assert [c.tokens for c in after] == [greedy_uncached(model, p, 20) for p in PROMPTS]


def test_a_model_without_mtp_modules_cannot_draft():
    decoder = Decoder(build(dataclasses.replace(TINY, num_nextn_predict_layers=0)))
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0: the model has no MTP module"):
        generate(decoder, [[1]], max_new_tokens=2, eos_ids=set(), speculative=True)
