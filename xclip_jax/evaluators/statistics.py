"""Statistics of evaluations: ranks, average precision, ROC AUC, correlations, F1; bootstrap of per-example values."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import scipy

from xclip_jax.core.errors import UserError

_CHUNK = 1 << 22  # scores that are ranked at once: some ten megabytes of temporaries


def valid_rows(scores: np.ndarray) -> np.ndarray:
    """Return which rows of scores (n, items) can be ranked, bool (n,): rows without NaN and plus infinity.

    A diverged model gives such scores; no score is higher than NaN, so counting higher scores would call the row right.
    Minus infinity is allowed: it excludes a class or an item.
    """
    return scores.max(axis=1) < np.inf  # the maximum of a row with NaN is NaN


def count_before(scores: np.ndarray, target: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return how many items of each row precede its target item, int (n,); equal scores rank by index, lowest first.

    Args:
      scores: (n, items).
      target: (n, 1) score of each row's target.
      index: int (n,), position of the target.
    """
    before, equal = np.count_nonzero(scores > target, axis=1), np.count_nonzero(scores == target, axis=1)
    tied = np.flatnonzero(equal > 1)
    lower = np.arange(scores.shape[1]) < index[tied, None]
    before[tied] += np.count_nonzero((scores[tied] == target[tied]) & lower, axis=1)
    return before


def row_blocks(scores: np.ndarray) -> Iterator[slice]:
    """Yield slices of the rows of scores (n, items), small enough for temporaries to take little memory."""
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores), step))


def ranks(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return how many items of each row precede the item at `index`, int (n,); see `count_before`.

    Counting needs no sorting and serves every k of "among the k best". A row without a valid ranking (not among
    `valid_rows`, or with minus infinity at `index`) has the largest integer.
    """
    rank = np.empty(len(scores), np.int64)
    for block in row_blocks(scores):
        part, right = scores[block], index[block]
        target = np.take_along_axis(part, right[:, None], axis=1)
        valid = valid_rows(part) & (target[:, 0] > -np.inf)
        rank[block] = np.where(valid, count_before(part, target, right), np.iinfo(np.int64).max)
    return rank


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, not interpolated: the mean of precision at each positive.

    As clip_benchmark's `average_precision_per_class`; equal scores rank by index, lowest first.

    Args:
      scores: (n, classes), higher is more likely.
      positives: bool of the same shape; an item may have several classes.

    Returns:
      (classes,), between 0 and 1; 0 for a class without positives, or with a score that is NaN or plus infinity.
    """
    hits, precision = _ranked(scores, positives)
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def eleven_point(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return PASCAL VOC 2007's average precision of each class, (classes,); see `average_precision`.

    It is the mean, over the recalls 0, 0.1, ... 1, of the best precision at that recall or above.
    """
    hits, precision = _ranked(scores, positives)
    total = np.maximum(hits.sum(axis=0), 1)
    recall = hits.cumsum(axis=0) / total
    # Ten times the recall is compared, in integers: a recall of 3 in 10 must reach 0.3.
    best = [np.where(10 * hits.cumsum(axis=0) >= point * total, precision, 0).max(axis=0) for point in range(11)]
    return np.where(recall[-1] > 0, np.mean(best, axis=0), 0)


def _ranked(scores: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether the item at each rank is a hit, and the precision at that rank; both (n, classes)."""
    scores, positives = np.asarray(scores), np.asarray(positives, bool)
    if scores.shape != positives.shape or scores.ndim != 2:
        raise UserError(
            f"expected scores and positives of one shape (items, classes); got {scores.shape} and {positives.shape}."
        )
    order = np.argsort(-scores.astype(np.float64), axis=0, kind="stable")
    hits = np.take_along_axis(positives & valid_rows(scores.T), order, axis=0)
    return hits, hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]


def roc_auc(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the probability that a positive item has a higher score than a negative one; a tie counts one half.

    Args:
      scores: (n,); NaN counts as wrong: lowest for a positive item, highest for a negative one.
      positives: bool (n,), with positive and negative items.

    Raises:
      UserError: all items are positive, or all negative.
    """
    positives = np.asarray(positives, bool)
    num_positive, num_negative = int(positives.sum()), int((~positives).sum())
    if not num_positive or not num_negative:
        raise UserError(
            f"ROC AUC needs positive and negative items; of {len(positives)} items {num_positive} are positive."
        )
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


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of two binary (n,), which equals Pearson's; 0 if one is constant."""
    return pearson(predicted, labels)


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

    def value(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """Return the statistic over the items `chosen`, by default all; in percent, except for "gmean"."""
        second = self.weights if self.statistic in _WEIGHTED else self.other
        scale = 1 if self.statistic == "gmean" else 100
        return scale * STATISTICS[self.statistic](self.values[chosen], None if second is None else second[chosen])


def mean_iou(intersection: np.ndarray, union: np.ndarray) -> float:
    """Return the mean over classes of intersection over union, between 0 and 1; both are summed over items first.

    Args:
      intersection, union: areas of each class in each item, (n, classes).

    Raises:
      UserError: no class has an area.
    """
    intersection, union = intersection.sum(axis=0, dtype=np.float64), union.sum(axis=0, dtype=np.float64)
    if not union.any():
        raise UserError("intersection over union needs a class with an area; got none.")
    return float((intersection[union > 0] / union[union > 0]).mean())


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(np.average(values, weights=weights))


def _gmean(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(np.exp(np.average(np.log(values), weights=weights)))


_WEIGHTED = ("mean", "gmean")
STATISTICS: Mapping[str, Callable[..., float]] = {
    "mean": _mean,
    "gmean": _gmean,
    "spearman": spearman,
    "pearson": pearson,
    "roc_auc": roc_auc,
    "f1": f1,
    "matthews": matthews,
    # A class missing from a resample counts 0 on both sides of a comparison.
    "map": lambda *items: float(average_precision(*items).mean()),
    "iou": mean_iou,
    "map11": lambda *items: float(eleven_point(*items).mean()),
}


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Return weights (n,) with which the mean over items is the mean over the classes that occur."""
    return 1 / np.bincount(labels)[labels]


def bootstrap(
    a: PerExample, b: PerExample, *, samples: int = 2000, level: float = 0.95, seed: int = 0, ratio: bool = False
) -> tuple[float, float, float]:
    """Return the difference b - a of two models' values, and its percentile interval by resampling pairs of items.

    Items with `groups` are resampled by whole groups, the groups of `a`. Resamples with an undefined statistic, such as
    ROC AUC of positive items only, are left out. The difference or the interval is NaN if it is undefined.

    Args:
      a, b: values of two models on the same items, in the same order.
      samples: number of resamples.
      level: confidence level.
      seed: seed of the resamples, which both sides share.
      ratio: whether to return b / a and its interval instead, for geometric means.

    Raises:
      UserError: the two have different items.
    """
    if a.statistic != b.statistic or len(a.values) != len(b.values):
        raise UserError(
            f"results over {len(a.values)} and {len(b.values)} items cannot be paired; evaluate both again."
        )

    def difference(chosen: np.ndarray | slice = slice(None)) -> float:
        of_a, of_b = a.value(chosen), b.value(chosen)
        return of_b / of_a if ratio else of_b - of_a

    try:
        whole = difference()
    except UserError:  # the items do not define the statistic
        whole = np.nan
    return whole, *_percentiles(a, difference, samples, level, seed)


def interval(items: PerExample, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of `items.value()`, resampled as in `bootstrap`; NaN if it is undefined."""
    return _percentiles(items, items.value, samples, level, seed)


def _percentiles(
    items: PerExample, value: Callable[[np.ndarray], float], samples: int, level: float, seed: int
) -> tuple[float, float]:
    """Return the ends of the middle `level` of `value(indices)` over resamples that define it."""
    rng, sample = np.random.default_rng(seed), _resampler(items)
    defined = []
    for _ in range(samples):
        with contextlib.suppress(UserError):
            defined.append(value(sample(rng)))
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)]) if defined else (np.nan, np.nan)
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
