"""Whether results are above chance: a binomial interval of the share of right answers, for the page."""

import math
from collections.abc import Mapping

import scipy.stats

from xclip_jax.evaluators import summary

LEVEL = 0.95


def verdicts(results: Mapping[str, float]) -> dict[tuple[str, str], str]:
    """{(set, metric): "above chance", "below chance" or "not distinguishable from chance"}.

    Of the first metric of each set, where that is a share of items and chance is known. The interval is Clopper and
    Pearson's, which takes items to be independent and of one weight.
    """
    judged = {}
    for family, name, values in summary.rows(results):
        for metric, value in list(values.items())[:1]:
            items, chance = _expected(results, f"{family}/{name}", metric)
            if items and math.isfinite(value):
                right = min(max(round(items * value / 100), 0), items)
                interval = scipy.stats.binomtest(right, items).proportion_ci(LEVEL)
                above, below = interval.low > chance, interval.high < chance
                judged[name, metric] = (
                    f"{'above' if above else 'below'} chance" if above or below else "not distinguishable from chance"
                )
    return judged


def _expected(results: Mapping[str, float], prefix: str, metric: str) -> tuple[int, float]:
    """Number of items of a metric and the share of them that chance gets right; no items where that is not known."""
    size = {key: results.get(f"{prefix}/{key}", 0.0) for key in ("n", "ways", "majority", "images", "queries", "texts")}
    if metric.rpartition("/")[2] == "top1" and size["n"] and (size["majority"] or size["ways"]):
        return int(size["n"]), size["majority"] / 100 or 1 / size["ways"]
    if metric == "image_to_text/r1" and size["images"]:
        # An image has captions / images right ones on average, of all captions.
        return int(size["images"]), 1 / size["images"]
    if metric == "r1" and size["queries"] and size["texts"]:
        return int(size["queries"]), 1 / size["texts"]
    return 0, 0.0
