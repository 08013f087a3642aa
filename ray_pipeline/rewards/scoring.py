"""Scores of many completions by several rewards. A reward that raises, hangs or dies never becomes a silent 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_pipeline.errors import UserError
from ray_pipeline.isolation.function_pool import Call, FunctionPool, Outcome
from ray_pipeline.rewards.registry import RewardEntry, get_reward

if TYPE_CHECKING:
    from ray_pipeline.settings.post_training import ScoringConfig

Item = tuple[str, str, str]
"""(prompt, completion, reference)"""


@dataclass
class Scores:
    """Scores of completions, in the order they were given.

    Attributes:
        rewards: weighted sum of each completion's parts; NaN where a part failed.
        parts: by reward name, unweighted; NaN where that reward failed.
        failed: whether any part did: such a completion must not be trained on.
        failures: by reward name, how many failed; only names that did. errors: by name, the first one's text.
    """

    rewards: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def check(self, max_failures: float) -> Scores:
        """Raise UserError where a reward failed for more than that share of the completions."""
        total = len(self.rewards)
        for name, count in self.failures.items():
            if count > max_failures * total:
                raise UserError(
                    f'the reward "{name}" failed for {count} of {total} completions, more than max_failures='
                    f"{max_failures:g} allows. First error: {self.errors[name]}. Fix the function or the references, "
                    "allow it more time (grpo.scoring.timeout_seconds), or more failures (grpo.scoring.max_failures)."
                )
        return self


class Scorer:
    """Rewards with their weights, and the processes that those which may hang are called in.

    Used as a context; processes are kept from one call to the next.
    """

    def __init__(self, weights: Mapping[str, float], settings: ScoringConfig):
        """
        Args:
            weights: reward name to weight.
        Raises:
            UserError: an unknown reward, or a function that another process could not find.
        """
        self.weights, self.settings = dict(weights), settings
        self.entries: dict[str, RewardEntry] = {name: get_reward(name) for name in weights}
        isolated = sorted({entry.address for entry in self.entries.values() if entry.isolated})
        self._pool = FunctionPool(
            isolated,
            timeout_seconds=settings.timeout_seconds,
            processes=settings.processes,
            offered={"without_landlock": settings.without_landlock},
        )

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def score(self, items: Sequence[Item]) -> Scores:
        """Every reward of every completion. The same for any number of processes.

        Raises:
            UserError: a reward failed for more than `max_failures` of the completions, or cannot be imported.
        """
        ours = [name for name, entry in self.entries.items() if not entry.isolated]
        found = {name: [self._in_process(name, item) for item in items] for name in ours}
        found |= self._isolated(items)
        scores = Scores()
        for i in range(len(items)):
            self._add(scores, {name: found[name][i] for name in self.entries})
        return scores.check(self.settings.max_failures)

    def _in_process(self, name: str, item: Item) -> Outcome:
        try:
            return Outcome(self.entries[name](*item))
        except Exception as error:  # noqa: BLE001  a user may have registered it as one that cannot fail
            return Outcome(error=f"{type(error).__name__}: {error}")

    def _isolated(self, items: Sequence[Item]) -> dict[str, list[Outcome]]:
        names = [name for name, entry in self.entries.items() if entry.isolated]
        calls = [
            Call(self.entries[name].address, (*self.entries[name].leading, *item)) for name in names for item in items
        ]
        outcomes = self._pool.run(calls) if calls else []
        return {name: outcomes[i * len(items) : (i + 1) * len(items)] for i, name in enumerate(names)}

    def _add(self, scores: Scores, outcomes: Mapping[str, Outcome]) -> None:
        parts = {}
        for name, outcome in outcomes.items():
            value, error = _number(outcome)
            parts[name] = value
            if error is not None:
                scores.failures[name] = scores.failures.get(name, 0) + 1
                scores.errors.setdefault(name, error)
        # A NaN part makes the sum NaN, also with a weight of 0.
        reward = sum(self.weights[name] * value for name, value in parts.items())
        scores.rewards.append(reward)
        scores.parts.append(parts)
        scores.failed.append(math.isnan(reward))


def _number(outcome: Outcome) -> tuple[float, str | None]:
    """The reward, or NaN and what was wrong with it."""
    if outcome.error is not None:
        return math.nan, outcome.error
    value = outcome.value
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return math.nan, f"returned {value!r}, which is no finite number"[:200]
    return float(value), None
