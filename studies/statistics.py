"""Statistics over seeds: intervals of means, paired differences, exact sign-flip tests, Holm's correction."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95
MIN_SEEDS = 3  # with fewer an interval says little: none is shown, and nothing is decided
FEW_SEEDS = 5  # with fewer a paired interval is often narrow by chance
_EXACT = 16  # differences up to which all signs are tried


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its interval, which is NaN for a single seed."""

    mean: float
    low: float
    high: float
    n: int

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate on another scale, by a function that keeps the order, such as `math.exp`."""
        return Estimate(function(self.mean), function(self.low), function(self.high), self.n)


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """The mean of differences paired by seed.

    Attributes:
      values: the differences, in the order of seeds.
      positive: how many of them are above zero.
      p_t: two-sided p of the paired t-test; 1 where n is 1.
      p_flip: two-sided p of the sign-flip test, at least 2 / 2^n.
      standard_error: of the mean; NaN where n is 1.
    """

    values: tuple[float, ...]
    positive: int
    p_t: float
    p_flip: float
    standard_error: float


def estimate(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """Return the mean of at least one value with Student's t-interval."""
    x = np.asarray(values, float)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(scipy.stats.t.ppf(0.5 + level / 2, n - 1) * x.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """Return the difference a - b over the seeds that both have, or None where there are none.

    Args:
      a, b: {seed: value}; one seed is one order of the data and one initialisation on both sides.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    d = np.array([a[seed] - b[seed] for seed in seeds])
    of_mean, n = estimate(d), len(d)
    error = float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    p_t = min(1.0, 2 * p_above(abs(of_mean.mean), error, n))
    return Difference(
        of_mean.mean,
        of_mean.low,
        of_mean.high,
        n,
        values=tuple(map(float, d)),
        positive=int((d > 0).sum()),
        p_t=p_t,
        p_flip=sign_flip(d),
        standard_error=error,
    )


def welch(plus: Sequence[Mapping[int, float]], minus: Sequence[Mapping[int, float]]) -> Estimate | None:
    """Return the sum of the means of `plus` less the sum of `minus` with Welch's interval; None where one has no runs.

    It takes all runs as independent, and the scatter of each group of them: with few seeds it is steadier than the
    paired interval, whose scatter is that of as few differences. It is NaN where a group has a single run; n is that
    of the smallest group.

    Args:
      plus, minus: groups of runs, {seed: value}; one of each for a difference, two for the change of one.
    """
    groups = [np.array(list(group.values()), float) for group in (*plus, *minus)]
    if not all(map(len, groups)):
        return None
    signs, n = [1] * len(plus) + [-1] * len(minus), min(map(len, groups))
    mean = float(sum(sign * x.mean() for sign, x in zip(signs, groups, strict=True)))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    variances = [x.var(ddof=1) / len(x) for x in groups]
    if not (variance := sum(variances)):
        return Estimate(mean, mean, mean, n)
    freedom = variance**2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, groups, strict=True))
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, freedom) * math.sqrt(variance))
    return Estimate(mean, mean - half, mean + half, n)


def p_above(mean: float, standard_error: float, n: int) -> float:
    """One-sided p of the t-test that a mean of n values is above 0; 1 where n is 1."""
    if n < 2:
        return 1.0
    if standard_error == 0:
        return 0.0 if mean > 0 else 0.5 if mean == 0 else 1.0
    return float(scipy.stats.t.sf(mean / standard_error, n - 1))


def seeds_needed(mean: float, deviation: float, most: int = 100, power: float = 0.8) -> int | None:
    """Fewest seeds with which a two-sided paired t-test at 5 % shows a true mean above 0; None if `most` are too few.

    Args:
      mean, deviation: of the differences, in one unit.
      most: seeds that are tried.
      power: the probability with which it is shown.
    """
    if mean <= 0:
        return None
    for n in range(2, most + 1):
        shift = mean * math.sqrt(n) / deviation if deviation else math.inf
        if math.isinf(shift) or scipy.stats.nct.sf(scipy.stats.t.ppf(0.5 + LEVEL / 2, n - 1), n - 1, shift) >= power:
            return n
    return None


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the permutation test that differences are symmetric around 0: all 2^n signs are tried.

    It assumes nothing of their distribution. The smallest p of n seeds is 2 / 2^n: 0.0625 for five.

    Raises:
      ValueError: more differences than can be enumerated.
    """
    d = np.asarray(differences, float)
    if len(d) > _EXACT:
        raise ValueError(f"{len(d)} differences; at most {_EXACT} are enumerated")
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    sums = np.abs(signs @ d)
    return float(np.mean(sums >= abs(d.sum()) - 1e-9 * np.abs(d).sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of one family by Holm's step-down procedure, in the order given."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
