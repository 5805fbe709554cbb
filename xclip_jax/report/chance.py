"""Intervals of results, and tests whether results are above chance."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy

from xclip_jax.evaluators import summary
from xclip_jax.evaluators.result import Result
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

    A share of items has Clopper and Pearson's binomial interval, which assumes independent items of equal weight.
    Where the result has per-example values, and these have weights, groups or another statistic than a mean of zeros
    and ones, they are resampled.
    """
    low, high, resampled = math.nan, math.nan, False
    if result.items is not None and not _binary(result.items):
        (low, high), resampled = interval(result.items, samples=_SAMPLES), True
    elif result.unit == "%" and result.n and math.isfinite(result.value):
        right = min(max(round(result.n * result.value / 100), 0), result.n)
        exact = scipy.stats.binomtest(right, result.n).proportion_ci(LEVEL)
        low, high = 100 * exact.low, 100 * exact.high
    verdict = ""
    if result.unit == "%" and result.chance is not None and math.isfinite(low):
        verdict = ABOVE if low > result.chance else BELOW if high < result.chance else UNDECIDED
    return Judgement(low, high, verdict, resampled)


def _binary(items: PerExample) -> bool:
    plain = items.statistic == "mean" and items.weights is None and items.groups is None
    return plain and bool(np.isin(items.values, (0, 1)).all())


def judgements(results: Sequence[Result]) -> dict[tuple[str, str], Judgement]:
    """Judgements of the first metric of each row of the tables, by {(set and task, metric)}."""
    first = {(row.name, row.shown[0][0].name): row.shown[0][1] for row in summary.rows(results)}
    return {key: judge(result) for key, result in first.items()}


def verdicts(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """{(set, metric): verdict} of the first metric of each set, where there is a verdict."""
    return {key: judged.verdict for key, judged in judgements(results).items() if judged.verdict}
