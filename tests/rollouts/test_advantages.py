"""Group-relative advantages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_pipeline.rollouts.advantages import group_advantages


def test_matches_trl_by_hand():
    out = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.1]), 4)
    mean, std = 0.525, 0.6075909  # sample standard deviation, n - 1
    torch.testing.assert_close(out, torch.tensor([(r - mean) / (std + 1e-4) for r in (1.0, 0.0, 0.0, 1.1)]))


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5), st.integers(2, 9))
def test_groups_that_score_the_same_get_exactly_zero(rewards, group_size):
    assert group_advantages(torch.tensor(rewards).repeat_interleave(group_size), group_size).tolist() == [0.0] * (
        len(rewards) * group_size
    )


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=12, max_size=12))
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
