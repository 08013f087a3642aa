"""Means, paired tests and their power equal scipy's, a table's and what simulation gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from ray_pipeline.evaluation.seed_statistics import POWER, detectable, holm, mean_of, power, seed_test

OWN, OTHER = [2.61, 2.55, 2.70, 2.58], [2.74, 2.66, 2.77, 2.75]


def test_the_interval_is_students():
    mean = mean_of(OWN)
    low, high = scipy.stats.ttest_1samp(OWN, 0.0).confidence_interval(0.95)
    assert (mean.count, mean.value) == (4, pytest.approx(np.mean(OWN)))
    assert (mean.low, mean.high) == (pytest.approx(low), pytest.approx(high))
    assert mean.spread == pytest.approx(np.std(OWN, ddof=1))
    # Student's table: t of 2 degrees of freedom at 97.5% is 4.3027
    assert mean_of([0.0, 1.0, 2.0]).high == pytest.approx(1 + 4.3027 / math.sqrt(3), abs=1e-4)


def test_one_seed_has_a_mean_and_no_interval():
    assert mean_of([3.0]).low is None and mean_of([3.0]).value == 3.0
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_the_paired_test_is_scipys():
    test = seed_test(OWN, OTHER)
    reference = scipy.stats.ttest_rel(OWN, OTHER)
    low, high = reference.confidence_interval(0.95)
    assert test.p_value == pytest.approx(reference.pvalue)
    assert (test.low, test.high) == (pytest.approx(low), pytest.approx(high))
    assert test.difference == pytest.approx(np.mean(OWN) - np.mean(OTHER)) and test.pairs == 4


def test_equal_figures_are_no_difference_and_a_constant_one_is_certain():
    assert (seed_test(OWN, OWN).p_value, seed_test(OWN, OWN).detectable) == (1.0, 0.0)
    assert seed_test([1.0, 2.0], [2.0, 3.0]).p_value == 0.0
    for other in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="at least two"):
            seed_test(OWN[: len(other)] if len(other) == 1 else OWN, other)


@pytest.mark.parametrize("pairs", [2, 3, 5, 20])
def test_a_detectable_difference_is_found_as_often_as_promised(pairs):
    spread, repeats = 0.3, 40_000
    true = detectable(spread, pairs)
    drawn = np.random.default_rng(pairs).normal(true, spread, size=(repeats, pairs))
    found = np.mean(scipy.stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05)
    assert found == pytest.approx(POWER, abs=4 * math.sqrt(POWER * (1 - POWER) / repeats))


@pytest.mark.parametrize("pairs", [2, 3, 5, 20])
def test_power_is_that_of_the_noncentral_t(pairs):
    bound, shift = scipy.stats.t.ppf(0.975, pairs - 1), 3.0
    upper, lower = (scipy.stats.nct.cdf(x, pairs - 1, shift) for x in (bound, -bound))
    assert power(shift, pairs) == pytest.approx(1 - upper + lower, abs=1e-6)


def test_without_a_difference_the_power_is_the_level():
    assert power(0.0, 3) == pytest.approx(0.05, abs=1e-6) and power(0.0, 30) == pytest.approx(0.05, abs=1e-6)


def test_holm_steps_down_as_published():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []
