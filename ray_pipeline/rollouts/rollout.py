"""One sampled answer as data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Rollout:
    """One sampled answer.

    Attributes:
        completion_ids: the end token included, where there is one.
        logprobs: of each completion token under the policy that sampled it, at the sampling temperature.
        reward: weighted sum of `parts`. parts: each reward before weighting.
        question_index: index among all questions of the step.
        finished: ended by itself rather than at a limit.
        forced: for each completion token, whether it was written for the model, so that nothing can be learned from
            its choice. Empty for none.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    reward: float
    parts: dict[str, float]
    question_index: int
    finished: bool
    forced: list[bool] = field(default_factory=list)
