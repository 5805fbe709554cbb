"""Statistics of evaluations: ranks, average precision, ROC AUC, correlations, F1; bootstrap of per-example values."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import scipy

from xclip_jax.core.errors import UserError

_CHUNK = 1 << 22  # scores ranked at once: some ten megabytes of temporaries


def valid_rows(scores: np.ndarray) -> np.ndarray:
    """Return which rows of scores (n, items) can be ranked, bool (n,): rows without NaN and plus infinity.

    A diverged model gives such scores; no score is higher than NaN, so counting higher scores would call the row right.
    Minus infinity is allowed: it excludes a class or an item.
    """
    return scores.max(axis=1) < np.inf  # the maximum of a row with NaN is NaN


def row_blocks(scores: np.ndarray) -> Iterator[slice]:
    """Yield slices of the rows of scores (n, items), small enough for temporaries to take little memory."""
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores), step))


def ranks(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return how many items of each row precede the item at `index`, int (n,); equal scores rank by index.

    Counting needs no sorting and serves every k of "among the k best". A row without a valid ranking (not among
    `valid_rows`, or with minus infinity at `index`) has the largest integer.
    """
    rank = np.empty(len(scores), np.int64)
    for block in row_blocks(scores):
        part, right = scores[block], index[block]
        target = np.take_along_axis(part, right[:, None], axis=1)
        valid = valid_rows(part) & (target[:, 0] > -np.inf)
        before = np.count_nonzero(part > target, axis=1)
        equal = np.count_nonzero(part == target, axis=1)
        tied = np.flatnonzero(equal > 1)
        lower = np.arange(part.shape[1]) < right[tied, None]
        before[tied] += np.count_nonzero((part[tied] == target[tied]) & lower, axis=1)
        rank[block] = np.where(valid, before, np.iinfo(np.int64).max)
    return rank


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, not interpolated, (classes,): the mean of precision at each positive.

    As clip_benchmark's `average_precision_per_class`, from scores (n, classes) and bool `positives` of the same shape;
    equal scores rank by index. It is 0 for a class without positives, or with a score of NaN or plus infinity.
    """
    hits, precision = _ranked(scores, positives)
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def eleven_point(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return PASCAL VOC 2007's average precision of each class, (classes,); see `average_precision`.

    It is the mean, over the recalls 0, 0.1, ... 1, of the best precision at that recall or above.
    """
    hits, precision = _ranked(scores, positives)
    total = np.maximum(hits.sum(axis=0), 1)
    # Ten times the recall is compared, in integers: a recall of 3 in 10 must reach 0.3.
    best = [np.where(10 * hits.cumsum(axis=0) >= point * total, precision, 0).max(axis=0) for point in range(11)]
    return np.mean(best, axis=0)


def _ranked(scores: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether the item at each rank is a hit, and the precision at that rank; both (n, classes)."""
    scores = np.asarray(scores)
    positives = np.asarray(positives, bool)
    order = np.argsort(-scores.astype(np.float64), axis=0, kind="stable")
    hits = np.take_along_axis(positives & valid_rows(scores.T), order, axis=0)
    return hits, hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]


def roc_auc(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the probability that a positive item has a higher score than a negative one; a tie counts one half.

    `scores` are (n,); NaN counts as wrong: lowest for a positive item, highest for a negative one. `positives` are bool
    (n,); `UserError` if all or none are positive.
    """
    positives = np.asarray(positives, bool)
    num_positive = int(positives.sum())
    num_negative = int((~positives).sum())
    if not num_positive or not num_negative:
        raise UserError(f"ROC AUC needs positive and negative items; {num_positive} of {len(positives)} are positive.")
    scores = np.where(np.isnan(scores), np.where(positives, -np.inf, np.inf), scores)
    ranks = scipy.stats.rankdata(scores)
    return float((ranks[positives].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of (n,) and (n,), ties at their mean rank; 0 if one is constant."""
    return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y)) if np.isfinite(x).all() else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of (n,) and (n,); 0 if one is constant or not finite."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 and np.isfinite(norm) else 0.0


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return F1 of class 1, between 0 and 1; 0 without true positives."""
    both = np.sum((predicted == 1) & (labels == 1))
    return float(2 * both / max(np.sum(predicted == 1) + np.sum(labels == 1), 1))


@dataclasses.dataclass(frozen=True, eq=False)
class PerExample:
    """Per-example values of a metric, for resampling; `value()` is the metric.

    Attributes:
      values: (n,) for the statistic "mean"; otherwise scores or predicted classes, as `STATISTICS` takes them.
      weights: weights of the mean, (n,).
      other: targets: gold values, classes, or bool.
      statistic: a key of `STATISTICS`.
      groups: int (n,), equal for dependent items, such as pictures of one concept; `bootstrap` resamples whole groups.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    other: np.ndarray | None = None
    statistic: str = "mean"
    groups: np.ndarray | None = None

    def trials(self) -> int:
        """Return the number of binomial trials in a mean of zeros and ones; 0 for values that need resampling.

        Independent items of equal weight are one trial each. For equal values it is Kish's effective
        number of groups, or of items without groups: (sum of weights)^2 / sum of squared weights.
        """
        if self.statistic != "mean" or not np.isin(self.values, (0, 1)).all():
            return 0
        weights = np.ones(len(self.values)) if self.weights is None else self.weights
        equal = np.ptp(self.values[weights > 0]) == 0
        if self.groups is not None:
            weights = np.bincount(np.unique(self.groups, return_inverse=True)[1], weights)
        independent = len(weights) == len(self.values) and np.allclose(weights, weights[0], rtol=1e-9, atol=0)
        return round(weights.sum() ** 2 / (weights**2).sum()) if independent or equal else 0

    def value(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """Return the statistic over the items `chosen`, by default all; in percent, except for "gmean"."""
        second = self.weights if self.statistic in _WEIGHTED else self.other
        scale = 1 if self.statistic == "gmean" else 100
        return scale * STATISTICS[self.statistic](self.values[chosen], None if second is None else second[chosen])


def mean_iou(intersection: np.ndarray, union: np.ndarray) -> float:
    """Return the mean over classes of intersection over union, both summed over items first, between 0 and 1.

    `intersection` and `union` are the areas of each class in each item, (n, classes).
    """
    intersection = intersection.sum(axis=0, dtype=np.float64)
    union = union.sum(axis=0, dtype=np.float64)
    return float((intersection[union > 0] / union[union > 0]).mean())


_WEIGHTED = ("mean", "gmean")
STATISTICS: Mapping[str, Callable[..., float]] = {
    "mean": lambda values, weights: float(np.average(values, weights=weights)),
    "gmean": lambda values, weights: float(np.exp(np.average(np.log(values), weights=weights))),
    "spearman": spearman,
    "pearson": pearson,
    "roc_auc": roc_auc,
    "f1": f1,
    "matthews": pearson,  # equal for two classes
    # A class missing from a resample counts 0 on both sides of a comparison.
    "map": lambda *items: float(average_precision(*items).mean()),
    "iou": mean_iou,
    "map11": lambda *items: float(eleven_point(*items).mean()),
}


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Return weights (n,) with which the mean over items is the mean over the classes that occur."""
    return 1 / np.bincount(labels)[labels]


def bootstrap(
    a: PerExample, b: PerExample | None = None, *, samples: int = 2000, ratio: bool = False
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a's value, or of the difference b - a of two models, by resampling items.

    Items with `groups` are resampled by whole groups, the groups of `a`. Resamples with an undefined statistic, such as
    ROC AUC of positive items only or a mean whose weights are all 0, are left out. The interval is NaN if no resample
    defines it.

    Both have the same items, in the same order. With `ratio` the interval covers the quotient b / a, for geometric
    means, and else the difference b - a.
    """
    if b is not None and (a.statistic != b.statistic or len(a.values) != len(b.values)):
        raise UserError(
            f"results over {len(a.values)} and {len(b.values)} items cannot be paired; evaluate both again."
        )
    rng = np.random.default_rng(0)
    draw = _resampler(a)
    defined = []
    for _ in range(samples):
        chosen = draw(rng)
        with contextlib.suppress(UserError, ZeroDivisionError):
            value = a.value(chosen)
            if b is not None:
                other = b.value(chosen)
                value = other / value if ratio else other - value
            defined.append(value)
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (np.nan, np.nan)
    return float(low), float(high)


def _resampler(items: PerExample) -> Callable[[np.random.Generator], np.ndarray]:
    """Return a function that draws indices of items, or of whole groups of items, with replacement."""
    n = len(items.values)
    if items.groups is None:
        return lambda rng: rng.integers(0, n, n)
    order = np.argsort(items.groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(items.groups[order])) + 1)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])

    return draw
