"""Tests whether results are above chance, by a binomial interval of the accuracy."""

import math
from collections.abc import Sequence

import scipy.stats

from xclip_jax.evaluators import summary
from xclip_jax.evaluators.result import Result

LEVEL = 0.95


def verdict(result: Result) -> str:
    """Return "above chance", "below chance" or "not distinguishable from chance".

    It is "" for a number that is not a share of items, or without a known chance level. The interval is Clopper and
    Pearson's, which assumes independent items of equal weight.
    """
    if result.unit != "%" or result.chance is None or not result.n or not math.isfinite(result.value):
        return ""
    right = min(max(round(result.n * result.value / 100), 0), result.n)
    interval = scipy.stats.binomtest(right, result.n).proportion_ci(LEVEL)
    if interval.low > result.chance / 100:
        return "above chance"
    return "below chance" if interval.high < result.chance / 100 else "not distinguishable from chance"


def verdicts(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """{(set, metric): verdict} of the first metric of each set, where there is a verdict."""
    first = {(row.name, row.shown[0][0].name): row.shown[0][1] for row in summary.rows(results)}
    return {key: text for key, result in first.items() if (text := verdict(result))}
