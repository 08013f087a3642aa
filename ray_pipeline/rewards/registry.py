"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.rewards.answer import answer
from ray_pipeline.rewards.think_format import think_format

Reward = Callable[[str, str, str], float]

REWARDS: dict[str, Reward] = {"answer": answer, "format": think_format}


def get_reward(name: str) -> Reward:
    """The function `(prompt, completion, reference) -> float` of that name.

    Raises:
        UserError: naming the rewards there are.
    """
    if name not in REWARDS:
        raise UserError(
            f"reward {name!r} is not known{did_you_mean(name, REWARDS)}. Known: {', '.join(sorted(REWARDS))}."
        )
    return REWARDS[name]
