"""Group-relative advantages and the penalty for length, against TRL's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from ray_pipeline.rollouts.advantages import group_advantages, overlong_penalty
from tests.objectives import trl_oracles

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.35, 1.0, 1.1]), min_size=12, max_size=12)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(seed))


def excluded(seed: int) -> torch.Tensor:
    """One group with a single reward left, one with none."""
    out = torch.rand(24, generator=torch.Generator().manual_seed(seed)) < 0.3
    out[:5], out[5], out[6:12] = True, False, True
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some excluded"])
def test_group_advantages_are_trls(scale, some):
    rewards, out = draw(1), excluded(2) if some else torch.zeros(24, dtype=torch.bool)
    want = trl_oracles.advantages(rewards.masked_fill(out, torch.nan), 6, scale_rewards=scale)
    got = group_advantages(rewards, 6, scale_rewards=scale, excluded=out)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert int((got != 0).sum()) > 6


@pytest.mark.parametrize("some", [False, True], ids=["all", "some excluded"])
def test_leave_one_out_advantages_are_trls(some):
    rewards, out = draw(3), excluded(4) if some else torch.zeros(24, dtype=torch.bool)
    want = trl_oracles.advantages(rewards.masked_fill(out, torch.nan), 6, rloo=True)
    got = group_advantages(rewards, 6, baseline="rloo", scale_rewards="none", excluded=out)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_matches_the_formula_by_hand():
    out = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.1]), 4)
    mean, std = 0.525, 0.6075909  # sample standard deviation, n - 1
    torch.testing.assert_close(out, torch.tensor([(r - mean) / (std + 1e-4) for r in (1.0, 0.0, 0.0, 1.1)]))


@given(SCORES, st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from(["group", "rloo"]))
def test_what_is_excluded_is_as_if_it_had_not_been_sampled(rewards, left_out, baseline):
    """A group without it gives the others the same advantages, whatever its own reward is."""
    out = torch.tensor(left_out)
    given = torch.tensor(rewards).masked_fill(out, torch.nan)
    got = group_advantages(given, 6, baseline=baseline, excluded=out)
    assert bool((got[out] == 0).all())
    for group in (slice(0, 6), slice(6, 12)):
        kept = ~out[group]
        if int(kept.sum()) < 2:
            assert got[group].tolist() == [0.0] * 6
        else:
            alone = group_advantages(torch.tensor(rewards)[group][kept], int(kept.sum()), baseline=baseline)
            torch.testing.assert_close(got[group][kept], alone)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5), st.integers(2, 9),
    st.sampled_from(["group", "rloo"]), st.sampled_from(["group", "none"]),
)  # fmt: skip
def test_groups_that_score_the_same_get_exactly_zero(rewards, group_size, baseline, scale):
    same = torch.tensor(rewards).repeat_interleave(group_size)
    got = group_advantages(same, group_size, baseline=baseline, scale_rewards=scale)
    assert got.tolist() == [0.0] * (len(rewards) * group_size)


@given(SCORES)
def test_each_group_sums_to_zero_and_keeps_the_order_of_rewards(rewards):
    out = group_advantages(torch.tensor(rewards), 4)
    assert out.view(3, 4).sum(1).abs().max() < 1e-4
    for group in range(3):
        pairs = sorted(zip(rewards[group * 4 : group * 4 + 4], out[group * 4 : group * 4 + 4].tolist(), strict=True))
        assert [a for _, a in pairs] == sorted(a for _, a in pairs)


@pytest.mark.parametrize(("count", "group_size"), [(5, 2), (4, 1)])
def test_broken_groups_are_refused(count, group_size):
    with pytest.raises(ValueError, match=f"{count} rewards in groups of {group_size}"):
        group_advantages(torch.zeros(count), group_size)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=20), st.integers(1, 64))
def test_the_overlong_penalty_is_trls(lengths, buffer):
    want = get_soft_overlong_punishment(64, buffer)([[0] * length for length in lengths])
    torch.testing.assert_close(overlong_penalty(lengths, 64, buffer, 1.0), torch.tensor(want))
    torch.testing.assert_close(overlong_penalty(lengths, 64, buffer, 0.5), torch.tensor(want) / 2)


def test_without_a_buffer_no_answer_loses_anything():
    assert overlong_penalty([1, 64], 64, 0, 1.0).tolist() == [0.0, 0.0]
