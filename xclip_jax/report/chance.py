"""Intervals of results, and tests whether results are above chance."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy

from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import PerExample, interval

LEVEL = 0.95
ABOVE, BELOW, UNDECIDED = "above chance", "below chance", "not distinguishable from chance"
_SAMPLES = 1000  # a resample of average precision takes milliseconds


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A result's interval in its own unit, NaN where it has none, and the verdict against chance.

    Attributes:
      low, high: ends of the interval of level `LEVEL`.
      verdict: `ABOVE`, `BELOW`, `UNDECIDED`, or "" for a number without an interval or a known chance level.
      resampled: whether the interval is a bootstrap of per-example values, not a binomial one.
    """

    low: float
    high: float
    verdict: str
    resampled: bool

    def __str__(self) -> str:
        """The interval in words."""
        return f"{self.low:.1f} to {self.high:.1f}" if math.isfinite(self.low) else ""


@functools.lru_cache(256)
def judge(result: Result) -> Judgement:
    """Return the interval of a result and its verdict.

    A share of items has Clopper and Pearson's binomial interval, which assumes independent items of equal weight; a
    mean per class, in which items of rare classes weigh more, has none. Where the result has per-example values, and
    these have unequal weights, groups or another statistic than a mean of zeros and ones, they are resampled. Resamples
    of values that are all right or all wrong cannot differ: these have the binomial interval of their effective number,
    see `_trials`.
    """
    low, high, items = math.nan, math.nan, result.items
    n = result.n if items is None else _trials(items)
    if items is not None and not n:
        low, high = interval(items, samples=_SAMPLES)
    elif result.unit == "%" and n and math.isfinite(result.value) and not result.metric.endswith("mean_per_class"):
        right = min(max(round(n * result.value / 100), 0), n)
        exact = scipy.stats.binomtest(right, n).proportion_ci(LEVEL)
        low, high = 100 * exact.low, 100 * exact.high
    verdict = ""
    if result.unit == "%" and result.chance is not None and math.isfinite(low):
        verdict = ABOVE if low > result.chance else BELOW if high < result.chance else UNDECIDED
    return Judgement(low, high, verdict, resampled=items is not None and not n)


def _trials(items: PerExample) -> int:
    """Return how many binomial trials a mean of zeros and ones is of; 0 for values that have to be resampled.

    Independent items of equal weight are one trial each. Of values that are all equal it is Kish's effective number of
    groups, or of items without groups: (sum of weights)^2 / sum of squared weights.
    """
    if items.statistic != "mean" or not np.isin(items.values, (0, 1)).all():
        return 0
    weights = np.ones(len(items.values)) if items.weights is None else items.weights
    equal = np.ptp(items.values[weights > 0]) == 0
    if items.groups is not None:
        weights = np.bincount(np.unique(items.groups, return_inverse=True)[1], weights)
    independent = len(weights) == len(items.values) and np.allclose(weights, weights[0], rtol=1e-9, atol=0)
    return round(weights.sum() ** 2 / (weights**2).sum()) if independent or equal else 0


def judgements(results: Sequence[Result]) -> dict[tuple[str, str], Judgement]:
    """Judgements of the first metric of each row of the tables, by {(set and task, metric)}."""
    first = {(row.name, row.shown[0][0].name): row.shown[0][1] for row in tables.rows(results)}
    return {key: judge(result) for key, result in first.items()}


def verdicts(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """{(set, metric): verdict} of the first metric of each set, where there is a verdict."""
    return {key: judged.verdict for key, judged in judgements(results).items() if judged.verdict}
