"""The sampler draws from the distribution it is given."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.generate.sampler import choose, draw_uniforms, inverse_cdf, keep_top_k, keep_top_p

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(40000, -1)
    tokens, _ = choose(logits, draw_uniforms([5], 40000)[0], temperature=0.5)
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


def test_temperature_zero_takes_the_likeliest():
    tokens, logprobs = choose(torch.tensor([[0.0, 3.0, 1.0]]), None, temperature=0.0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([[0.0, 3.0, 1.0]]).log_softmax(-1)[:, 1])


def test_uniforms_depend_on_the_seed_alone():
    assert torch.equal(draw_uniforms([7, 8], 5)[0], draw_uniforms([9, 7], 5)[1])
