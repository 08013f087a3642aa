"""What is asked of a sampler, what it answers, and one marked answer as data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor


def request_seed(seed: int, step: int, question: int, sample: int) -> int:
    """A 63-bit seed of its own for every request of a run."""
    digest = hashlib.sha256(f"{seed}/{step}/{question}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class SampleRequest:
    """One answer to sample: the prompt's token ids, and the seed of all its draws."""

    prompt: list[int]
    seed: int


@dataclass
class ToolUse:
    """What one answer did with tools: calls, those that a tool could take, and those that were answered by an error."""

    calls: int = 0
    valid: int = 0
    errors: int = 0


@dataclass
class Sampled:
    """One answer as tokens, the way they were sampled: they are never tokenised again.

    Attributes:
        tokens: the end token included, where there is one.
        logprobs: of each token under the policy that sampled it, at the sampling temperature.
        finished: ended by itself rather than at a limit.
        forced: for each token, whether it was written for the model (the end of a spent think budget, what a tool
            said), so that nothing can be learned from its choice. Empty for none.
        routing: experts that were chosen, int16 [prompt + completion - 1, MoE layers * experts per token]; None where
            it was not recorded.
        tools: None where none were offered.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    forced: list[bool] = field(default_factory=list)
    routing: Tensor | None = field(default=None, compare=False)
    tools: ToolUse | None = None


@dataclass
class Rollout:
    """One sampled answer with its marks.

    Attributes:
        completion_ids, logprobs, finished, forced, routing, tools: see `Sampled`.
        reward: weighted sum of `parts`, less the penalty for length. parts: each reward before weighting.
        question_index: index among all questions of the step.
        failed: a reward function failed on it, so that it is no example of anything.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    reward: float
    parts: dict[str, float]
    question_index: int
    finished: bool
    forced: list[bool] = field(default_factory=list)
    routing: Tensor | None = field(default=None, compare=False)
    tools: ToolUse | None = None
    failed: bool = False
