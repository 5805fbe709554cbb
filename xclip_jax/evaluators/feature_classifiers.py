"""Classifiers on frozen features: nearest neighbours, and logistic regression with C chosen on validation items."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import logistic
from xclip_jax.evaluators.statistics import valid_rows

NEIGHBOURS, TEMPERATURE = 20, 0.07
COARSE = tuple(10.0**e for e in range(-6, 7, 2))
_CHUNK = 1 << 25  # similarities at once, fp32

Examples = tuple[np.ndarray, np.ndarray]  # features (n, d) and labels int (n,)
Score = Callable[[np.ndarray, np.ndarray], float]  # of logits (n, classes) and labels; higher is better
# 1.0 for right items, else 0.0 (n,), and {metric: value} of the fit.
Fit = tuple[np.ndarray, dict[str, float]]


def knn(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int) -> np.ndarray:
    """Return votes of the nearest `NEIGHBOURS` by cosine, like DINO (arXiv 2104.14294).

    A vote has the weight exp(cosine / `TEMPERATURE`). `train` and `queries` are features (n, d) and (m, d), of any
    norm, `labels` classes int (n,), and the votes fp32 (m, classes). Equally near items rank by index, lowest first.
    """
    k = min(NEIGHBOURS, len(train))
    base = jax.device_put(_unit(train), may_alias=True)
    of_base = jnp.asarray(labels)
    step = max(1, _CHUNK // max(len(train), k * classes))
    parts = np.array_split(_unit(queries), math.ceil(len(queries) / step))  # of at most two sizes
    return np.concatenate([np.asarray(_vote(part, base, of_base, k=k, classes=classes)) for part in parts])


# The training set is an argument: an array captured by a jitted function would become a constant of the program.
@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(q: jax.Array, base: jax.Array, labels: jax.Array, *, k: int, classes: int) -> jax.Array:
    cosine, index = jax.lax.top_k(jnp.matmul(q, base.T, precision=jax.lax.Precision.HIGHEST), k)
    weights = jnp.exp((cosine - 1) / TEMPERATURE)  # without the common factor exp(1 / TEMPERATURE)
    return jnp.einsum("mk,mkc->mc", weights, jax.nn.one_hot(labels[index], classes, dtype=jnp.float32))


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", x, x))  # np.linalg.norm would store all squares
    return x / np.maximum(norms, 1e-12)[:, None]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Values of C to try: `coarse` ones, then `halvings` times those halfway (in log C) to the neighbours of the best.

    The CLIP paper has 7 values from 1e-6 to 1e6 and 4 halvings, down to eight steps per decade.
    """

    coarse: Sequence[float] = COARSE  # ascending
    halvings: int = 4
    tolerance: float = 1e-5  # of `logistic.fit`
    refit: bool = True  # whether to fit the tested classifier on given validation items too


def search(train: Examples, validation: Examples, classes: int, sweep: Sweep, score: Score) -> float:
    """Return the C with the best score on validation items, the smallest of equals."""
    scores: dict[float, float] = {}
    cs = sweep.coarse
    step = np.log10(cs[1] / cs[0])
    for _ in range(sweep.halvings + 1):
        new = [c for c in cs if min(sweep.coarse) <= c <= max(sweep.coarse) and c not in scores]
        if new:
            logits = logistic.fit(*train, new, classes, tolerance=sweep.tolerance).logits(validation[0])
            scores |= {c: score(part, validation[1]) for c, part in zip(new, logits, strict=True)}
        step /= 2
        cs = [_best(scores) * 10.0**-step, _best(scores) * 10.0**step]
    return _best(scores)


def _best(scores: Mapping[float, float]) -> float:
    return min(scores, key=lambda c: (-scores[c], c))


def folds(labels: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield training and test items, bool (n,), of up to `count` folds, none empty: random, stratified by class."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # grouped by class, each in random order
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % count
    for number in np.unique(fold):
        yield fold != number, fold == number


def choose(x: np.ndarray, y: np.ndarray, classes: int, cs: Sequence[float], count: int, tolerance: float) -> float:
    """Return the C of `cs` with the best mean accuracy over `count` folds, the smallest of equals."""
    accuracy = np.zeros(len(cs))
    for train, test in folds(y, count):
        logits = logistic.fit(x[train], y[train], cs, classes, tolerance=tolerance).logits(x[test])
        accuracy += [is_right(part, y[test]).mean() for part in logits]
    return _best(dict(zip(cs, accuracy.tolist(), strict=True)))


def nested(x: np.ndarray, y: np.ndarray, classes: int, cs: Sequence[float], count: int, tolerance: float) -> Fit:
    """Run SentEval's nested cross-validation: test each fold once, with C chosen by folds of all other items."""
    right = np.zeros(len(y))
    chosen = []
    for train, test in folds(y, count):
        chosen.append(choose(x[train], y[train], classes, cs, count, tolerance))
        fit = logistic.fit(x[train], y[train], [chosen[-1]], classes, tolerance=tolerance)
        right[test] = is_right(fit.logits(x[test])[0], y[test])
    return right, {"log10_c": float(np.mean(np.log10(chosen)))}


def linear(train: Examples, validation: Examples, test: Examples, classes: int, sweep: Sweep, score: Score) -> Fit:
    """Run CLIP's linear probe: C by `search` on validation items, then one fit, tested once.

    The last fit reads the training items, and with `sweep.refit` the validation items too. Without validation items a
    random tenth of `train`, at least one item, is held out for the search.
    Returns 1.0 for right test items, else 0.0 (n,), and {"log10_c": the choice}.
    """
    given = train, validation
    if not len(validation[1]):
        if len(train[1]) < 2:
            raise UserError("a probe has one training item and no validation split; it needs two items, or the split.")
        order = np.random.default_rng(0).permutation(len(train[1]))
        tenth = max(1, len(order) // 10)
        x, y = train
        validation, train = ((x[part], y[part]) for part in (order[:tenth], order[tenth:]))
    best = search(train, validation, classes, sweep, score) if len(sweep.coarse) > 1 else sweep.coarse[0]
    del train, validation  # if a tenth was held out, a copy of most features
    whole = together(*given) if sweep.refit else given[0]
    logits = logistic.fit(*whole, [best], classes, tolerance=sweep.tolerance).logits(test[0])[0]
    return is_right(logits, test[1]), {"log10_c": float(np.log10(best))}


def together(a: Examples, b: Examples) -> Examples:
    """Concatenate two sets of items, without a copy if one is empty."""
    if not len(a[1]) or not len(b[1]):
        return a if len(a[1]) else b
    return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])


def is_right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return 1.0 where the highest logit, the first of equals, is the label's; rows with NaN or +inf are wrong."""
    return ((logits.argmax(axis=1) == labels) & valid_rows(logits)).astype(float)
