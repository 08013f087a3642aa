"""A rollout as data: what is asked of a sampler, and a completion with what it is worth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from model.generate.decode import Completion

RIGHT = 1.0  # what a reward that judges gives a right answer


def request_seed(*place: int | str) -> int:
    """A 63-bit seed of its own for every place: (run's seed, step, question, sample), or (seed, question, sample)."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class SampleRequest:
    """One completion to sample: the prompt's token ids, and the seed of all its draws."""

    prompt: list[int]
    seed: int


@dataclass
class Marked:
    """A completion with what it is worth.

    Attributes:
        text: the completion as rewards read it.
        reward: weighted sum of `parts`, less a penalty for length; NaN where a part failed.
        parts: each reward before weighting.
        question: index among all questions of the step.
        failed: a reward function failed on it, so that it is no example of anything.
    """

    completion: Completion
    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    question: int = 0
    failed: bool = False
    text: str = ""
