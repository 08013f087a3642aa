"""Balancing losses against their formulas, token by token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.moe.balance import affinities, batch_loss, sequence_loss


def scores_of(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.data())
def test_sequence_loss_is_deepseek_v3s_equations_17_to_20(rows, length, experts, data):
    k = data.draw(st.integers(1, experts))
    scores = scores_of(rows * length, experts)
    chosen = scores.topk(k, dim=-1).indices
    total = 0.0
    for row in range(rows):
        loss = 0.0
        for i in range(experts):
            f = p = 0.0
            for t in range(row * length, (row + 1) * length):
                f += experts / (k * length) * (i in chosen[t].tolist())
                p += float(scores[t, i] / scores[t].sum()) / length
            loss += f * p
        total += loss * length  # as a sum over tokens
    torch.testing.assert_close(sequence_loss(scores, chosen, rows), torch.tensor(total, dtype=torch.float64))


def test_the_share_of_choices_has_no_gradient_and_the_mean_score_has():
    scores = scores_of(6, 4).requires_grad_()
    chosen = scores.detach().topk(2, dim=-1).indices
    sequence_loss(scores, chosen, 2).backward()
    counts = torch.stack([chosen[:3].flatten().bincount(minlength=4), chosen[3:].flatten().bincount(minlength=4)])
    plain = scores.detach().clone().requires_grad_()
    (affinities(plain).unflatten(0, (2, 3)).sum(1) * counts * 4 / (2 * 3)).sum().backward()
    torch.testing.assert_close(scores.grad, plain.grad)


@given(st.integers(1, 6), st.integers(2, 6))
def test_batch_loss_is_switch_transformers_with_a_given_share(tokens, experts):
    scores, fraction = scores_of(tokens, experts), scores_of(1, experts, seed=1)[0]
    fraction = fraction / fraction.sum()
    want = tokens * experts * (fraction * affinities(scores).mean(0)).sum()
    torch.testing.assert_close(batch_loss(scores, fraction), want)


def test_both_are_one_a_token_where_experts_are_used_evenly():
    scores = torch.ones(8, 4, dtype=torch.float64)
    chosen = torch.arange(8)[:, None] % 4
    assert float(sequence_loss(scores, chosen, 2)) == 8
    torch.testing.assert_close(float(batch_loss(scores, torch.full((4,), 0.25, dtype=torch.float64))), 8.0)


def test_an_even_or_unknown_share_moves_nothing():
    for fraction in (torch.full((4,), 0.25, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)):
        scores = scores_of(6, 4).requires_grad_()
        batch_loss(scores, fraction).backward()
        torch.testing.assert_close(scores.grad, torch.zeros_like(scores.grad), rtol=0, atol=1e-15)


def test_a_busy_expert_is_pushed_down_and_an_idle_one_up():
    scores = torch.full((1, 3), 0.5, dtype=torch.float64, requires_grad=True)
    batch_loss(scores, torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64)).backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 2]
