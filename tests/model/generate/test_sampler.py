"""The sampler draws from the distribution it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.generate.sampler import (
    Sampling,
    distributions,
    draw,
    draw_uniforms,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40000, -1)
    tokens = draw(distributions(logits, Sampling(temperature=0.5))[1], draw_uniforms([5], 40000)[0])
    frequency = torch.bincount(tokens, minlength=4) / 40000
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


@given(logit_lists, st.floats(0, 1, exclude_max=True), st.integers(1, 12), st.floats(0.01, 1))
def test_a_cut_token_is_never_drawn(logits, uniform, top_k, top_p):
    kept = keep_top_p(keep_top_k(torch.tensor([logits]).log_softmax(-1), top_k), top_p)
    token = inverse_cdf(kept, torch.tensor([uniform], dtype=torch.float64))
    assert kept[0, token].isfinite()


@given(logit_lists)
def test_the_largest_uniform_still_names_a_token(logits):
    padded = torch.tensor([[*logits, -torch.inf]])
    token = inverse_cdf(padded, torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert padded[0, token].isfinite()


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logprobs = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    assert keep_top_p(logprobs, 0.79).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_p(logprobs, 0.4).isfinite().tolist() == [[True, False, False, False]]


def test_top_k_keeps_k():
    assert keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_k(torch.tensor([[3.0, 1.0]]), 7).isfinite().all()


def test_min_p_one_keeps_only_the_likeliest():
    logprobs = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert keep_min_p(logprobs, 1.0).isfinite().tolist() == [[True, False, False, False], [True] * 4]


@given(logit_lists, st.floats(0.01, 0.99))
def test_min_p_cuts_what_transformers_cuts(logits, p):
    from transformers.generation.logits_process import MinPLogitsWarper

    scores = torch.tensor([logits])
    theirs = MinPLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.long), scores)
    assert torch.equal(keep_min_p(scores.log_softmax(-1), p).isfinite(), theirs.isfinite())


@given(logit_lists, st.lists(st.integers(0, 1), min_size=1, max_size=5), st.floats(0.1, 10))
def test_the_repetition_penalty_is_transformers(logits, tokens, penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    scores, row = torch.tensor([logits]), torch.tensor([tokens])
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, row, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(row, scores)
    torch.testing.assert_close(penalize_repetition(scores, seen, penalty), theirs, rtol=0, atol=0)


@given(st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True), st.integers(0, 2**32))
def test_all_settings_together_are_transformers(logits, seed):
    from transformers.generation import logits_process as hf

    values = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    settings = Sampling(0.3 + values[0], 4, 0.5 + values[1] / 2, values[2] / 3, 1 + values[3])
    scores, row = torch.tensor([logits]) / 8, torch.tensor([[0, 3]])
    seen = torch.zeros(1, 6, dtype=torch.bool).scatter_(1, row, True)
    theirs = scores
    for warp in (
        hf.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        hf.TemperatureLogitsWarper(settings.temperature),
        hf.TopKLogitsWarper(settings.top_k),
        hf.TopPLogitsWarper(settings.top_p),
        hf.MinPLogitsWarper(settings.min_p),
    ):
        theirs = warp(row, theirs)
    logprobs, kept = distributions(scores, settings, seen)
    torch.testing.assert_close(kept.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprobs, (scores / settings.temperature).log_softmax(-1), rtol=1e-5, atol=1e-6)


def test_temperature_zero_takes_the_likeliest_and_reports_it_at_temperature_one():
    logprobs, kept = distributions(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(temperature=0, top_k=1, min_p=1))
    assert draw(kept, None).tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([[0.0, 3.0, 1.0]]).log_softmax(-1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0 .greedy. or a positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1: must be 0 .all tokens. or more"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1: must be from 0"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be positive; 1 leaves"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=40))
def test_greedy_takes_the_first_of_equally_likely_tokens(rows):
    assert draw(torch.tensor(rows).float(), None).tolist() == [row.index(max(row)) for row in rows]


def test_uniforms_depend_on_the_seed_alone():
    assert torch.equal(draw_uniforms([7, 8], 5)[0], draw_uniforms([9, 7], 5)[1])
