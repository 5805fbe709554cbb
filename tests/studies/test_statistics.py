"""Statistics over seeds against scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.stats

from studies.statistics import estimate, holm, p_above, paired, seeds_needed, sign_flip, welch

A, B = (np.random.default_rng(seed).normal(10 + seed, 2, 7) for seed in (0, 1))


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_interval_equals_scipy():
    e = estimate(A)
    low, high = scipy.stats.t.interval(0.95, len(A) - 1, A.mean(), scipy.stats.sem(A))
    assert (e.mean, e.low, e.high, e.n) == pytest.approx((A.mean(), low, high, 7))


def test_interval_of_two_in_closed_form():
    # Student's t with one degree of freedom is Cauchy's distribution: its 97.5 % quantile is tan(0.475 pi).
    e = estimate([1.0, 3.0])
    assert (e.mean, e.high - e.mean) == pytest.approx((2.0, math.tan(0.475 * math.pi)))


def test_one_seed_has_no_interval():
    e = estimate([1.0])
    assert (e.mean, e.n) == (1.0, 1) and math.isnan(e.low) and math.isnan(e.high)


def test_geometric_mean_by_logarithms():
    e = estimate(np.log([2.0, 8.0])).mapped(math.exp)
    assert e.mean == pytest.approx(4.0) and e.low * e.high == pytest.approx(16.0)


def test_paired_equals_scipy():
    d = paired(by_seed(A), by_seed(B))
    test = scipy.stats.ttest_rel(A, B)
    interval = test.confidence_interval()
    assert (d.p_t, d.low, d.high) == pytest.approx((test.pvalue, interval.low, interval.high))
    assert d.values == pytest.approx(tuple(A - B)) and d.positive == (A > B).sum()


def test_welch_equals_scipy():
    interval = scipy.stats.ttest_ind(A, B[:4], equal_var=False).confidence_interval()
    d = welch([by_seed(A)], [by_seed(B[:4])])
    assert (d.mean, d.low, d.high, d.n) == pytest.approx((A.mean() - B[:4].mean(), interval.low, interval.high, 4))


def test_welch_of_two_each_in_closed_form():
    """Of two values a side, with equal scatter, it is the t-test of two degrees of freedom."""
    d = welch([{0: 1.0, 1: 3.0}], [{5: 0.0, 6: 2.0}])
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))  # quantile of two degrees of freedom, closed form
    assert (d.mean, d.high - d.mean, d.n) == pytest.approx((1.0, t * math.sqrt(2), 2))


def test_welch_of_a_change_in_closed_form():
    """Of four groups of two values with equal scatter it is Student's t of four degrees of freedom."""
    groups = [{0: x - 1.0, 1: x + 1.0} for x in (5.0, 1.0, 3.0, 2.0)]
    d = welch(groups[:2], groups[2:])
    # Each mean has a variance of 1, and their sum 4; the quantile of four degrees of freedom is in any table.
    assert (d.mean, d.high - d.mean, d.n) == pytest.approx((1.0, 2.776445 * 2, 2))


def test_welch_needs_runs_on_both_sides():
    assert welch([{}], [{0: 1.0}]) is None
    one = welch([{0: 3.0}], [{0: 1.0, 1: 2.0}])
    assert (one.mean, one.n) == (1.5, 1) and math.isnan(one.low) and math.isnan(one.high)


def test_welch_without_scatter():
    same = welch([{0: 2.0, 1: 2.0}], [{0: 1.5, 1: 1.5, 2: 1.5}])
    assert (same.mean, same.low, same.high, same.n) == (0.5, 0.5, 0.5, 2)


def test_pairs_are_of_common_seeds():
    d = paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 1.0, 7: 0.0})
    assert d.values == (0.0, 0.5) and d.n == 2
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_equal_differences_have_no_error():
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p_t == 0.0
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.p_t, same.p_flip, same.positive) == (1.0, 1.0, 0)


def test_p_above_is_one_sided():
    d = A - B
    expected = scipy.stats.ttest_1samp(d, 0, alternative="greater").pvalue
    assert p_above(d.mean(), scipy.stats.sem(d), 7) == pytest.approx(expected)
    assert p_above(1.0, math.nan, 1) == 1.0


def test_seeds_needed_are_those_of_textbooks():
    """Cohen's tables for a paired t-test, two-sided at 5 %, power 80 %; and by simulation."""
    assert [seeds_needed(d, 1.0) for d in (0.5, 0.8, 1.0)] == [34, 15, 10]
    assert seeds_needed(0.1, 1.0) is None and seeds_needed(-1.0, 1.0) is None
    drawn = np.random.default_rng(0).normal(1.6, 1.0, (20_000, 6))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / np.sqrt(6))
    assert seeds_needed(1.6, 1.0) == 6 and np.mean(t > scipy.stats.t.ppf(0.975, 5)) > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_sign_flip_equals_scipys_exact_test(seed):
    d = np.random.default_rng(seed).normal(0.5, 1, 6)
    test = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d) == pytest.approx(test.pvalue)


def test_smallest_p_of_sign_flips():
    assert [sign_flip(np.arange(1.0, n + 1)) for n in (1, 3, 5)] == [1.0, 0.25, 0.0625]
    with pytest.raises(ValueError, match="17 differences; at most 16"):
        sign_flip(np.ones(17))


def test_holm():
    # Example: the smallest of four is multiplied by 4, the next by 3, and none falls below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    # With equal p it is Bonferroni's correction.
    assert holm([0.02] * 3) == pytest.approx([0.06] * 3)
