"""Statistics of evaluations: ranks, average precision, ROC AUC, correlations, F1; bootstrap of per-example values."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import scipy

from xclip_jax.core.errors import UserError

_CHUNK = 1 << 22  # scores to rank at once, with some ten megabytes of temporaries


def valid_rows(scores: np.ndarray) -> np.ndarray:
    """Return bool (n,), true for rows of scores (n, items) without NaN and plus infinity.

    Diverged models have such scores. No score exceeds NaN, so counting higher scores would rank it first. Minus
    infinity is valid: it excludes a class or an item.
    """
    return scores.max(axis=1) < np.inf  # the maximum of a row with NaN is NaN


def row_blocks(scores: np.ndarray) -> Iterator[slice]:
    """Return slices of the rows of scores (n, items), with small temporaries."""
    step = max(1, _CHUNK // max(1, scores.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores), step))


def ranks(scores: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return the number of items in each row that precede the item at `index`, int (n,); equal scores rank by index.

    A row without a valid ranking (not among `valid_rows`, or with minus infinity at `index`) has the largest integer.
    """
    rank = np.empty(len(scores), np.int64)
    for block in row_blocks(scores):
        part, right = scores[block], index[block]
        target = np.take_along_axis(part, right[:, None], axis=1)
        valid = valid_rows(part) & (target[:, 0] > -np.inf)
        earlier = np.arange(part.shape[1]) < right[:, None]
        before = np.count_nonzero((part > target) | (earlier & (part == target)), axis=1)
        rank[block] = np.where(valid, before, np.iinfo(np.int64).max)
    return rank


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return each class's average precision (classes,), not interpolated: the mean precision at its positives.

    Equals clip_benchmark's `average_precision_per_class`. `scores` and bool `positives` are (n, classes); equal scores
    rank by index. It is 0 for classes without positives, or with a score of NaN or plus infinity.
    """
    hits, precision = _ranked(scores, positives)
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def eleven_point(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return each class's average precision (classes,) by PASCAL VOC 2007; see `average_precision`.

    It is the mean, over the recalls 0, 0.1, ... 1, of the best precision at that recall or above.
    """
    hits, precision = _ranked(scores, positives)
    total = np.maximum(hits.sum(axis=0), 1)
    # In integers, ten times the recall: 3 positives of 10 must reach 0.3.
    best = [np.where(10 * hits.cumsum(axis=0) >= point * total, precision, 0).max(axis=0) for point in range(11)]
    return np.mean(best, axis=0)


def _ranked(scores: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hits and precision at each rank, both (n, classes)."""
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
    n = int(positives.sum())
    pairs = n * (len(positives) - n)
    if not pairs:
        raise UserError(f"ROC AUC needs positive and negative items; {n} of {len(positives)} are positive.")
    scores = np.where(np.isnan(scores), np.where(positives, -np.inf, np.inf), scores)
    return float((scipy.stats.rankdata(scores)[positives].sum() - n * (n + 1) / 2) / pairs)


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
      values: first argument of the statistic: values (n,), scores or predicted classes.
      weights: weights of the mean, (n,).
      other: targets of another statistic: gold values, classes, or bool.
      statistic: a key of `STATISTICS`.
      groups: int (n,), equal for dependent items, such as pictures of one concept; `bootstrap` resamples whole groups.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    other: np.ndarray | None = None
    statistic: str = "mean"
    groups: np.ndarray | None = None

    def trials(self) -> int:
        """Return the number of binomial trials in a mean of zeros and ones; 0 if values need resampling.

        Independent items of equal weight are one trial each. For equal values the number of groups (or of items
        without groups) is Kish's effective one: (sum of weights)^2 / sum of squared weights.
        """
        if self.statistic != "mean" or not np.isin(self.values, (0, 1)).all():
            return 0
        weights = np.ones(len(self.values)) if self.weights is None else self.weights
        equal = len(np.unique(self.values[weights > 0])) == 1
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
    """Return the mean over classes of intersection over union, (n, classes) areas summed over items first; 0 to 1."""
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
    # Classes missing from a resample count 0 on both sides of a comparison.
    "map": lambda *items: float(average_precision(*items).mean()),
    "iou": mean_iou,
    "map11": lambda *items: float(eleven_point(*items).mean()),
}


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Return weights (n,) that turn the mean over items into the mean over the occurring classes."""
    return 1 / np.bincount(labels)[labels]


def bootstrap(a: PerExample, b: PerExample | None = None, *, samples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of a's value, or of b - a of two models, by resampling.

    Both models have the same items in the same order. The groups of `a`, if any, are resampled as a whole. Resamples
    with an undefined statistic, such as ROC AUC of positive items only or a mean with zero weights, are left out. The
    interval is NaN without defined resamples.
    """
    if b is not None and (a.statistic != b.statistic or len(a.values) != len(b.values)):
        raise UserError(f"results over {len(a.values)} and {len(b.values)} items cannot be paired; evaluate again.")
    n = len(a.values)
    members: list[np.ndarray] = []
    if a.groups is not None:
        order = np.argsort(a.groups, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(a.groups[order])) + 1)
        n = len(members)
    rng = np.random.default_rng(0)
    defined = []
    for _ in range(samples):
        chosen = rng.integers(0, n, n)
        if members:
            chosen = np.concatenate([members[i] for i in chosen])
        with contextlib.suppress(UserError, ZeroDivisionError):
            value = a.value(chosen)
            defined.append(value if b is None else b.value(chosen) - value)
    defined = [value for value in defined if math.isfinite(value)]
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (np.nan, np.nan)
    return float(low), float(high)
