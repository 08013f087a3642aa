"""Which questions are asked when."""

from __future__ import annotations

import functools

import torch


class PromptOrder:
    """An epoch asks each question once, in a seeded order; places go on over epochs. A pure function of its arguments.

    Raises:
        ValueError: without a question.
    """

    def __init__(self, questions: int, seed: int):
        if questions < 1:
            raise ValueError(f"{questions} questions: there must be one at least")
        self.questions, self.seed = questions, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)  # torch takes no more
        return torch.randperm(self.questions, generator=generator).tolist()

    def at(self, place: int, count: int) -> list[int]:
        """Indices of the questions at places `place` to `place + count`."""
        return [self._epoch(p // self.questions)[p % self.questions] for p in range(place, place + count)]
