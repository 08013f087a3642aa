"""One sampled answer as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Rollout:
    """One sampled answer.

    Attributes:
        completion_ids: the end token included, where there is one.
        logprobs: of each completion token under the policy that sampled it, at the sampling temperature.
        reward: weighted sum of `parts`. parts: each reward before weighting.
        question_index: index among all questions of the step.
        finished: ended by itself rather than at a limit.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    reward: float
    parts: dict[str, float]
    question_index: int
    finished: bool
