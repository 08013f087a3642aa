"""From rewards to advantages. Pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# TRL's constant: a group that differs by a hair must not get huge advantages.
EPSILON = 1e-4


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    baseline: Literal["group", "rloo"] = "group",
    scale_rewards: Literal["group", "batch", "none"] = "group",
    excluded: Tensor | None = None,
) -> Tensor:
    """Reward relative to the other answers to the same prompt (GRPO, arXiv:2402.03300).

    Args:
        rewards: [num_prompts * group_size], any scale.
        baseline: what is subtracted: "group" the group's mean, "rloo" the mean of the group's other answers
            (arXiv:2402.14740; its own setting is scale_rewards="none").
        scale_rewards: what the difference is divided by: the unbiased standard deviation of the group's rewards or of
            the whole batch's, plus 1e-4 as TRL has it; "none" leaves it (Dr. GRPO, arXiv:2503.20783).
        excluded: [num_prompts * group_size] bool, answers without a reward. They count in no mean and no deviation.
    Returns:
        Same shape, fp32; exactly zero for what is excluded, for a group whose answers all scored the same, and for
        one with a single answer that counts.
    Raises:
        ValueError: if the length is not a multiple of `group_size`, or a group has fewer than two answers.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards in groups of {group_size}: need whole groups of at least 2")
    left_out = torch.zeros(len(rewards), dtype=torch.bool) if excluded is None else excluded.bool()
    counted = ~left_out.unflatten(0, (-1, group_size))
    groups = rewards.double().masked_fill(left_out, 0.0).unflatten(0, (-1, group_size))  # its value may be NaN
    count = counted.sum(1, keepdim=True)
    total = groups.sum(1, keepdim=True)
    others = (total - groups) / (count - 1).clamp(min=1)
    advantages = groups - (total / count.clamp(min=1) if baseline == "group" else others)
    if scale_rewards == "group":
        advantages = advantages / (_deviation(groups, counted, 1) + EPSILON)
    elif scale_rewards == "batch":
        advantages = advantages / (_deviation(groups.flatten(), counted.flatten(), 0) + EPSILON)
    # The mean of equal numbers is not always that number; rounding over EPSILON would train on noise.
    highest = groups.masked_fill(~counted, -torch.inf).amax(1, keepdim=True)
    same = highest == groups.masked_fill(~counted, torch.inf).amin(1, keepdim=True)
    return advantages.masked_fill(same | ~counted, 0.0).flatten().float()


def _deviation(values: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of the counted values along `dim`, kept; zero of fewer than two."""
    count = counted.sum(dim, keepdim=True)
    mean = (values * counted).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = ((values - mean) * counted).square().sum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def overlong_penalty(lengths: Sequence[int], max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """What an answer's reward loses for its length (DAPO, arXiv:2503.14476, eq. 13).

    Args:
        lengths: tokens of each answer. buffer: tokens before `max_new_tokens` in which the penalty grows from 0 to
            `penalty`; 0: no answer loses anything.
    Returns:
        [len(lengths)], at most 0: add it to the rewards.
    """
    over = torch.tensor(list(lengths), dtype=torch.float64) - (max_new_tokens - buffer)
    share = (over / buffer).clamp(0.0, 1.0) if buffer else torch.zeros_like(over)
    return (-penalty * share).float()
