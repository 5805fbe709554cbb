"""Measures other than shares of right answers, and what a result is made of: items that can be resampled."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats

from xclip_jax.errors import UserError


def valid_rows(scores: np.ndarray) -> np.ndarray:
    """Which rows can be ranked, bool (n,): those without NaN and without plus infinity, as a model that diverged has.

    Nothing compares as higher than NaN, so that counting what is higher would call such rows right. Minus infinity is
    allowed: it excludes a class or an item.

    Args:
      scores: (n, items), at least one item.
    """
    return scores.max(axis=1) < np.inf  # the maximum of a row with NaN is NaN


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Average precision of each class, not interpolated: the mean of precision at each positive.

    The definition of clip_benchmark's `average_precision_per_class`; equal scores rank by index, lowest first.

    Args:
      scores: (n, classes), higher is likelier.
      positives: bool of the same shape; several classes may hold for one item.

    Returns:
      (classes,), between 0 and 1; 0 for a class without positives, or with a score that is NaN or plus infinity.
    """
    hits, precision = _ranked(scores, positives)
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def eleven_point(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """PASCAL VOC 2007's average precision of each class, (classes,); arguments are those of `average_precision`.

    It is the mean, over the recalls 0, 0.1, ... 1, of the best precision at that recall or above.
    """
    hits, precision = _ranked(scores, positives)
    total = np.maximum(hits.sum(axis=0), 1)
    recall = hits.cumsum(axis=0) / total
    # Ten times the recall is compared, in integers: a recall of 3 in 10 must reach 0.3.
    best = [np.where(10 * hits.cumsum(axis=0) >= point * total, precision, 0).max(axis=0) for point in range(11)]
    return np.where(recall[-1] > 0, np.mean(best, axis=0), 0)


def _ranked(scores: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the item at each rank is a hit, and precision there; both (n, classes)."""
    scores, positives = np.asarray(scores), np.asarray(positives, bool)
    if scores.shape != positives.shape or scores.ndim != 2:
        raise UserError(f"scores {scores.shape} and positives {positives.shape} must both be (items, classes).")
    order = np.argsort(-scores.astype(np.float64), axis=0, kind="stable")
    hits = np.take_along_axis(positives & valid_rows(scores.T), order, axis=0)
    return hits, hits.cumsum(axis=0) / np.arange(1, len(hits) + 1)[:, None]


def roc_auc(scores: np.ndarray, positives: np.ndarray) -> float:
    """Probability that a positive item has a higher score than a negative one; a tie counts one half.

    Args:
      scores: (n,); NaN counts as wrong: below all others for a positive item, above them for a negative one.
      positives: bool (n,), with at least one of each kind.

    Raises:
      UserError: all items are of one kind.
    """
    positives = np.asarray(positives, bool)
    up, down = int(positives.sum()), int((~positives).sum())
    if not up or not down:
        raise UserError(f"ROC AUC needs positive and negative items; of {len(positives)} items {up} are positive.")
    scores = np.where(np.isnan(scores), np.where(positives, -np.inf, np.inf), scores)
    ranks = scipy.stats.rankdata(scores)
    return float((ranks[positives].sum() - up * (up + 1) / 2) / (up * down))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of (n,) and (n,), ties at their mean rank; 0 where one of them is constant."""
    return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y)) if np.isfinite(x).all() else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of (n,) and (n,); 0 where one of them is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 and np.isfinite(norm) else 0.0


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, between 0 and 1; 0 where nothing is found."""
    both = np.sum((predicted == 1) & (labels == 1))
    return float(2 * both / max(np.sum(predicted == 1) + np.sum(labels == 1), 1))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two binary (n,): Pearson's of the two; 0 where one is constant."""
    return pearson(predicted, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class PerExample:
    """What one number is made of, so that it can be resampled: `value()` is the number.

    Attributes:
      values: (n,) for statistic "mean"; otherwise scores, or classes that were predicted: what `STATISTICS` takes.
      weights: of a mean, (n,); images of three artists count so that each artist counts the same.
      other: what values are held against: gold values, classes, or bool.
      statistic: one of `STATISTICS`.
      groups: int (n,), equal for items that depend on each other, such as pictures of one concept; `bootstrap` draws
        groups and not single items.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    other: np.ndarray | None = None
    statistic: str = "mean"
    groups: np.ndarray | None = None

    def value(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """The statistic of the items `chosen`, by default of all; in percent, but for "gmean"."""
        second = self.weights if self.statistic in _WEIGHTED else self.other
        scale = 1 if self.statistic == "gmean" else 100
        return scale * STATISTICS[self.statistic](self.values[chosen], None if second is None else second[chosen])


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
    # A class that a resample lacks counts 0, on both sides of a comparison.
    "map": lambda *items: float(average_precision(*items).mean()),
    "map11": lambda *items: float(eleven_point(*items).mean()),
}


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (n,) with which the mean over items is the mean over the classes that occur."""
    return 1 / np.bincount(labels)[labels]


def bootstrap(
    a: PerExample, b: PerExample, *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The difference b - a in percentage points, and its percentile interval by resampling the items in pairs.

    Items with `groups` are resampled by whole groups, as many as there are: those of `a` count for both sides.

    Resamples in which the statistic is not defined are left out, as that of ROC AUC with items of one kind alone. The
    interval is NaN where no resample is left, and the difference where it is not defined itself.

    Args:
      a, b: the same items, in the same order, under two models.
      samples: resamples.
      level: of the interval.
      seed: decides the resamples; both sides get the same ones.

    Raises:
      UserError: sides of different items.
    """
    if a.statistic != b.statistic or len(a.values) != len(b.values):
        raise UserError(f"results over {len(a.values)} and {len(b.values)} items cannot be paired; evaluate both anew.")

    def difference(chosen: np.ndarray | slice = slice(None)) -> float | None:
        try:
            return b.value(chosen) - a.value(chosen)
        except UserError:  # these items do not define the statistic
            return None

    rng, sample = np.random.default_rng(seed), _resampler(a)
    draws = (difference(sample(rng)) for _ in range(samples))
    defined = [value for value in draws if value is not None]
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)]) if defined else (np.nan, np.nan)
    whole = difference()
    return np.nan if whole is None else whole, float(low), float(high)


def _resampler(items: PerExample) -> Callable[[np.random.Generator], np.ndarray]:
    """A function that draws indices of items with replacement, whole groups where the items have them."""
    n = len(items.values)
    if items.groups is None:
        return lambda rng: rng.integers(0, n, n)
    order = np.argsort(items.groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(items.groups[order])) + 1)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])

    return draw
