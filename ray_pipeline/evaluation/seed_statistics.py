"""Statistics of figures that were measured with several seeds: intervals of means, paired tests, their power.

Student's t (1908), by scipy: a handful of seeds is few, and the normal distribution would make their intervals too
narrow. Numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

import numpy as np

LEVEL = 0.05  # of two-sided tests; intervals hold 1 - LEVEL
POWER = 0.8  # at which a difference counts as one that would have been seen (Cohen 1988, §2.4)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. low, high: its 95% interval. spread: the standard deviation. All None for a single seed."""

    count: int
    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class SeedTest:
    """A setting against another, seed by seed.

    Attributes:
        pairs: seeds that both have. difference: mean of own figure minus the other's; low, high: its 95% interval.
        p_value: of the two-sided paired t-test. detectable: the smallest true difference that so many seeds, with the
            spread seen here, show with a chance of `POWER`.
    """

    pairs: int
    difference: float
    low: float
    high: float
    p_value: float
    detectable: float


def mean_of(values: Sequence[float]) -> Mean:
    """The mean with Student's interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    if len(values) == 1:
        return Mean(1, values[0])
    mean, spread = fmean(values), stdev(values)
    half = _quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return Mean(len(values), mean, mean - half, mean + half, spread)


def seed_test(own: Sequence[float], other: Sequence[float]) -> SeedTest:
    """The paired t-test of two settings.

    Args:
        own, other: a figure for each seed, in the same order; two or more.
    Raises:
        ValueError: different numbers of seeds, or fewer than two.
    """
    if len(own) != len(other) or len(own) < 2:
        raise ValueError(f"{len(own)} and {len(other)} seeds: a paired test needs the same ones, at least two")
    from scipy.special import stdtr

    mean = mean_of([a - b for a, b in zip(own, other, strict=True)])
    assert mean.low is not None and mean.high is not None and mean.spread is not None
    if mean.spread == 0.0:
        p_value = 1.0 if mean.value == 0.0 else 0.0
    else:
        p_value = float(2 * stdtr(mean.count - 1, -abs(mean.value) / mean.spread * math.sqrt(mean.count)))
    return SeedTest(mean.count, mean.value, mean.low, mean.high, p_value, detectable(mean.spread, mean.count))


def detectable(spread: float, pairs: int) -> float:
    """The smallest true difference that the paired t-test finds in `POWER` of all cases.

    Args:
        spread: standard deviation of the differences. pairs: seeds, two or more.
    """
    low, high = 0.0, 1.0
    while power(high, pairs) < POWER:
        high *= 2
    for _ in range(50):  # halves of the range: to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, pairs) < POWER else (low, middle)
    return high * spread / math.sqrt(pairs)


def power(shift: float, pairs: int) -> float:
    """Chance that the paired t-test rejects where the true difference is `shift` standard errors of its mean.

    That of a normal variable around `shift` to leave the bounds, averaged over what the spread may come out as. (The
    noncentral t distribution is the same; scipy's is NaN far in its tails.)
    """
    from scipy.special import ndtr

    limits, weights = _limits(pairs - 1)
    return float((weights * (ndtr(shift - limits) + ndtr(-limits - shift))).sum())


@cache
def _limits(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """How far from zero the test's numerator has to be, at the nodes of a quadrature over how large the spread comes
    out, and the nodes' weights."""
    from scipy.special import chdtri

    nodes, weights = np.polynomial.legendre.leggauss(200)
    return _quantile(freedom) * np.sqrt(chdtri(freedom, (1 - nodes) / 2) / freedom), weights / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all of several tests at once (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    out, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        out[index] = largest
    return out


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - LEVEL / 2))
