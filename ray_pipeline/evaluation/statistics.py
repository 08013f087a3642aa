"""Statistics of marked answers: intervals, pass@k, maj@k, and paired tests of two models. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK = 256  # resamples drawn at once; bounds memory at _CHUNK * number of questions


def wilson_interval(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a proportion, 95% by default (Wilson 1927): sound near 0 and 1, where the normal one is not.

    Args:
        correct: how many of `total` were right. A sum of shares (several answers to each question) is allowed: the mean
            of shares varies less than that of single answers, so the bounds are then wide enough.
    Raises:
        ValueError: unless 0 <= correct <= total.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct={correct} of total={total}: must be between 0 and the total")
    if total == 0:
        return 0.0, 1.0
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers drawn without replacement is right (arXiv:2107.03374, eq. 1), unbiased.

    Args:
        samples: answers that were drawn. correct: how many of them are right.
    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right in {samples}: k and the right ones are at most the samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(votes: Sequence[Hashable | None]) -> int | None:
    """Index of the first vote for what most voted for (self-consistency, arXiv:2203.11171).

    Of answers with equally many votes, the one given first wins. None abstains.

    Returns:
        None where everyone abstained.
    """
    count: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    for i, vote in enumerate(votes):
        if vote is not None:
            count[vote] = count.get(vote, 0) + 1
            first.setdefault(vote, i)
    if not count:
        return None
    return first[max(count, key=lambda vote: (count[vote], -first[vote]))]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models are equally good, from the questions on which they differ (McNemar 1947).

    Exact: of n = only_first + only_second differences, how likely is a split at least this uneven under Binomial(n, ½).
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"counts {only_first} and {only_second}: must not be negative")
    n, less = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(less + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), from 10,000 resamples; the same for the same seed.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("a bootstrap of no values")
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = np.concatenate(
        [
            data[rng.integers(0, len(data), size=(min(_CHUNK, RESAMPLES - at), len(data)))].mean(axis=1)
            for at in range(0, RESAMPLES, _CHUNK)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same questions.

    Attributes:
        questions: how many. accuracy, other_accuracy: means of the two.
        difference: accuracy - other_accuracy. interval: its 95% bootstrap interval over questions.
        better, worse: questions on which the first did better, and worse, than the other.
        p_value: McNemar's exact test; with several answers to a question, the sign test on their means.
    """

    questions: int
    accuracy: float
    other_accuracy: float
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p_value: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self) | {"interval": list(self.interval)}


def paired_test(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedTest:
    """Compare two models by their share of right answers to each question.

    Args:
        first, second: for each question, in the same order, a number from 0 to 1.
    Raises:
        ValueError: different numbers of questions, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} questions: a paired test needs the same ones, at least one")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    a, b = sum(first) / len(first), sum(second) / len(second)
    interval = bootstrap_interval(differences, seed=seed)
    return PairedTest(len(first), a, b, a - b, interval, better, worse, mcnemar_exact(better, worse))
