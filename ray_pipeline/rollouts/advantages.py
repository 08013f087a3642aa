"""From rewards to advantages. Pure tensor functions."""

from __future__ import annotations

from torch import Tensor

# TRL's constant: a group that differs by a hair must not get huge advantages.
EPSILON = 1e-4


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward relative to the other answers to the same prompt, in standard deviations (GRPO, arXiv:2402.03300).

    Args:
        rewards: [num_prompts * group_size], any scale.
    Returns:
        Same shape; (reward - mean) / (std + 1e-4) with the unbiased std, as TRL has it; exactly zero for a group whose
        answers all scored the same.
    Raises:
        ValueError: if the length is not a multiple of `group_size`, or a group has fewer than two answers.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards in groups of {group_size}: need whole groups of at least 2")
    groups = rewards.float().unflatten(0, (-1, group_size))
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPSILON)
    # The mean of equal numbers is not always that number; rounding over EPSILON would train on noise.
    same = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(same, 0.0).flatten()
