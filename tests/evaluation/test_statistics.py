"""Statistics equal the formulas they are named after: scipy, exact enumeration, and invariants."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.evaluation.statistics import (
    bootstrap_interval,
    majority,
    mcnemar_exact,
    paired_test,
    pass_at_k,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats")
SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


@given(st.integers(1, 300), st.data())
def test_wilson_is_scipys(total, data):
    correct = data.draw(st.integers(0, total))
    theirs = stats.binomtest(correct, total).proportion_ci(method="wilson")
    # 1.96 is the customary rounding of the quantile that scipy takes, 1.95996...
    assert wilson_interval(correct, total, z=stats.norm.ppf(0.975)) == pytest.approx((theirs.low, theirs.high))


def test_wilson_of_shares_holds_their_mean():
    low, high = wilson_interval(2.5, 10)
    assert wilson_interval(2, 10)[0] < low < 0.25 < high < wilson_interval(3, 10)[1]


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_wilson_holds_the_proportion_inside_zero_and_one(a, b):
    correct, total = min(a, b), max(a, b)
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= high <= 1.0
    if total:
        assert low - 1e-12 <= correct / total <= high + 1e-12


def test_wilson_refuses_more_right_than_asked():
    with pytest.raises(ValueError, match="correct=3 of total=2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        right = [i < correct for i in range(samples)]
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))))


@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_the_papers_product(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    # arXiv:2107.03374, figure 3: the numerically stable form.
    stable = 1.0 if samples - correct < k else 1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1))
    assert pass_at_k(samples, correct, k) == pytest.approx(stable, abs=1e-9)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(samples, correct, k):
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(samples, correct, k)


def test_majority_goes_by_votes_then_by_who_came_first():
    assert majority(["a", "b", "b"]) == 1
    assert majority(["b", "a", "a", "b"]) == 0, "a tie"
    assert majority([None, "c", None, None]) == 1, "abstentions are no votes"
    assert majority([None, None]) is None
    assert majority([]) is None


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12))
def test_the_majority_has_the_most_votes(votes):
    chosen = majority(votes)
    cast = [vote for vote in votes if vote is not None]
    if not cast:
        assert chosen is None
        return
    winner = votes[chosen]
    most = max(cast.count(vote) for vote in cast)
    assert cast.count(winner) == most and votes.index(winner) == chosen
    assert not any(cast.count(vote) == most for vote in votes[:chosen] if vote is not None)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(b, c):
    expected = stats.binomtest(min(b, c), b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mcnemar_by_hand():
    # Of 5 differences all one way: 2 * (1/2)^5.
    assert mcnemar_exact(5, 0) == 0.0625
    with pytest.raises(ValueError, match="must not be negative"):
        mcnemar_exact(-1, 2)


def test_the_bootstrap_interval_is_near_the_normal_one_where_that_is_right():
    values = [1.0] * 320 + [0.0] * 480
    spread = 1.96 * np.sqrt(0.4 * 0.6 / 800)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.4 - spread, abs=0.003) and high == pytest.approx(0.4 + spread, abs=0.003)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)


def test_the_bootstrap_is_scipys_up_to_its_own_noise():
    values = np.random.default_rng(5).normal(size=60)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)


@settings(max_examples=20)
@given(SHARES)
def test_the_bootstrap_stays_within_the_values(values):
    low, high = bootstrap_interval(values)
    # Means of up to 40 equal shares are exact to a few roundings.
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@settings(max_examples=20)
@given(SHARES, st.randoms(use_true_random=False))
def test_a_paired_test_turns_around_with_its_models(first, rng):
    second = list(first)
    rng.shuffle(second)
    one, other = paired_test(first, second), paired_test(second, first)
    assert one.difference == -other.difference
    assert (one.better, one.worse, one.p_value) == (other.worse, other.better, other.p_value)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-9)
    same = paired_test(first, first)
    assert (same.difference, same.interval, same.better, same.worse, same.p_value) == (0.0, (0.0, 0.0), 0, 0, 1.0)


def test_a_paired_test_by_hand():
    test = paired_test([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1])
    assert (test.questions, test.accuracy, test.other_accuracy, test.difference) == (8, 0.875, 0.25, 0.625)
    assert (test.better, test.worse, test.p_value) == (6, 1, pytest.approx(0.125))
    assert test.interval[0] <= 0.625 <= test.interval[1]


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 0.0]), ([], [])])
def test_a_paired_test_needs_the_same_questions(first, second):
    with pytest.raises(ValueError, match="a paired test needs the same ones"):
        paired_test(first, second)


def test_a_bootstrap_needs_values():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
