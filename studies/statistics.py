"""Statistics over seeds: intervals of means and of differences, exact sign-flip tests, Holm's correction."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95
MIN_SEEDS = 3  # fewer are too few for an interval and for a verdict


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its interval, which is NaN for a single seed."""

    mean: float
    low: float
    high: float
    n: int

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate on another scale, by an increasing function such as `math.exp`."""
        return Estimate(function(self.mean), function(self.low), function(self.high), self.n)


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """The mean of differences paired by seed."""

    values: tuple[float, ...]  # the differences, in the order of seeds
    p_flip: float  # two-sided p of the sign-flip test, at least 2 / 2^n
    standard_error: float  # of the mean; NaN for a single seed


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of at least one value with its 95 % t-interval."""
    x = np.asarray(values, float)
    n = len(x)
    mean = float(x.mean())
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """Return the difference a - b over common seeds of {seed: value}, or None without any."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    d = np.array([a[seed] - b[seed] for seed in seeds])
    of_mean = estimate(d)
    error = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
    return Difference(**vars(of_mean), values=tuple(map(float, d)), p_flip=sign_flip(d), standard_error=error)


def unpaired(
    plus: Sequence[Sequence[float]],
    minus: Sequence[Sequence[float]],
    pool: Sequence[Sequence[float]],
    comparisons: int = 1,
) -> Estimate | None:
    """Return the sum of the means of arms `plus` minus that of arms `minus`, with an interval from one common variance.

    The variance is that within the arms of `pool`. With several `comparisons` all intervals hold together with 95 %
    (Bonferroni). Without a value of an arm, None; `n` is the number of values of the smallest arm.
    """
    compared = [*plus, *minus]
    if not all(map(len, compared)):
        return None
    mean = sum(map(np.mean, plus)) - sum(map(np.mean, minus))
    pool = [values for values in pool if len(values)]
    freedom = sum(len(values) - 1 for values in pool)
    variance = sum(np.var(values) * len(values) for values in pool) / freedom if freedom else math.nan
    error = math.sqrt(variance * sum(1 / len(values) for values in compared))
    half = float(scipy.stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, freedom)) * error
    return Estimate(float(mean), float(mean - half), float(mean + half), min(map(len, compared)))


def p_above(mean: float, standard_error: float, n: int) -> float:
    """Return the one-sided p of the t-test that a mean of n values is above 0; 1 for a single value."""
    if n < 2:
        return 1.0
    if standard_error == 0:
        return float(np.select([mean > 0, mean == 0], [0.0, 0.5], 1.0))
    return float(scipy.stats.t.sf(mean / standard_error, n - 1))


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p of the permutation test that differences are symmetric around 0, over all 2^n signs.

    It assumes no distribution. The smallest p of n seeds is 2 / 2^n: 0.0625 for five.
    """
    d = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    sums = np.abs(signs @ d)
    return float(np.mean(sums >= abs(d.sum()) - 1e-9 * np.abs(d).sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Return the p of one family adjusted by Holm's step-down procedure, in the given order."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
