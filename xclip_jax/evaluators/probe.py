"""Visual representation: how much frozen features know, by a linear probe and by their nearest neighbours.

All use the pooled features, before any projection, as the CLIP paper does (arXiv 2103.00020, appendix A.3). They come
to the host whole; fitting runs on one device of each process, so that the result does not depend on the mesh.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.errors import UserError
from xclip_jax.evaluators import logistic, sgd
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.provenance import Provenance
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.statistics import PerExample, class_weights, valid_rows

NEIGHBOURS, TEMPERATURE = 20, 0.07
COARSE = tuple(10.0**e for e in range(-6, 7, 2))
_SEEDS = 3
_CHUNK = 1 << 25  # similarities at once, fp32

# Whether each test item is right, 0.0 or 1.0 (n,), or the share over several fits; and other metrics.
Fit = tuple[np.ndarray, dict[str, float]]


def knn(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """Votes of the k nearest by cosine, each weighted exp(cosine / temperature): DINO's protocol (arXiv 2104.14294).

    Args:
      train, queries: features (n, d) and (m, d), of any length.
      labels: classes int (n,).
      classes: number of them.
      k: neighbours; all, where the training set has fewer. Of equally near ones the lower index is taken.
      temperature: of the weights.

    Returns:
      fp32 (m, classes).
    """
    k = min(k, len(train))
    base = jnp.asarray(_unit(train))
    one_hot = jnp.asarray(np.eye(classes, dtype=np.float32)[labels])

    @jax.jit
    def vote(q: jax.Array) -> jax.Array:
        near, index = jax.lax.top_k(jnp.matmul(q, base.T, precision=jax.lax.Precision.HIGHEST), k)
        # exp(1 / temperature) is taken out: only ratios matter, and small temperatures would overflow.
        return jnp.einsum("mk,mkc->mc", jnp.exp((near - 1) / temperature), one_hot[index])

    step = min(max(1, _CHUNK // max(len(train), k * classes)), len(queries))
    padded = np.zeros((-(-len(queries) // step) * step, queries.shape[1]), np.float32)
    padded[: len(queries)] = _unit(queries)
    votes = [np.asarray(vote(padded[i : i + step])) for i in range(0, len(padded), step)]
    return np.concatenate(votes)[: len(queries)]


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def subset(labels: np.ndarray, amount: str, seed: int = 0) -> np.ndarray:
    """Indices of a part of a training set, sorted: "5-shot" is 5 of each class, "10%" that share of each, at least one.

    ImageNet's customary 1 % and 10 % are lists of their own (SimCLR's, TFDS `imagenet2012_subset`), not this draw.

    Raises:
      UserError: an amount of another form, or a class with fewer items than shots.
    """
    number = amount.removesuffix("-shot").removesuffix("%")
    kind = amount[len(number) :]
    try:
        value = float(number) if kind == "%" else int(number)
    except ValueError:
        value = 0
    in_range = 0 < value <= 100 if kind == "%" else value > 0  # NaN is not
    if kind not in ("%", "-shot") or not in_range:
        raise UserError(f"part of a training set {amount!r} is unknown; write N-shot or P%, as in 5-shot or 10%.")
    rng, chosen = np.random.default_rng(seed), []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        want = value if kind == "-shot" else max(1, round(len(members) * value / 100))
        if want > len(members):
            raise UserError(f"class {c} has {len(members)} training items, fewer than {amount} asks for.")
        chosen.append(rng.permutation(members)[:want])
    return np.sort(np.concatenate(chosen))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which C are tried.

    Attributes:
      coarse: the first, ascending.
      halvings: how often the two halfway to the neighbours of the best (in log C) are tried too, as far as they are
        within `coarse`. Seven from 1e-6 to 1e6 and 4 is the CLIP paper's search, which ends at eight steps a decade.
      tolerance: of `logistic.fit`.
    """

    coarse: Sequence[float] = COARSE
    halvings: int = 4
    tolerance: float = 1e-5


def search(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    classes: int,
    sweep: Sweep,
    score: Callable[[np.ndarray, np.ndarray], float],
) -> tuple[float, dict[float, float]]:
    """The best C on the validation items, the smaller of equal ones, and {C: score} of all that were tried."""
    scores: dict[float, float] = {}
    low, high = min(sweep.coarse), max(sweep.coarse)

    def trial(cs: Sequence[float]) -> None:
        new = [c for c in cs if low <= c <= high and c not in scores]
        if new:
            logits = logistic.fit(*train, new, classes, tolerance=sweep.tolerance).logits(validation[0])
            scores.update({c: score(part, validation[1]) for c, part in zip(new, logits, strict=True)})

    trial(sweep.coarse)
    step = np.log10(sweep.coarse[1] / sweep.coarse[0]) if len(sweep.coarse) > 1 else 0.0
    for _ in range(sweep.halvings):
        step /= 2
        best = _best(scores)
        trial([best * 10.0**-step, best * 10.0**step])
    return _best(scores), scores


def _best(scores: Mapping[float, float]) -> float:
    return min(scores, key=lambda c: (-scores[c], c))


def folds(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Number of the fold, 0 to `count` - 1, of each item (n,): each class spread evenly, drawn with `seed`.

    Raises:
      UserError: fewer items than folds.
    """
    if len(labels) < count:
        raise UserError(f"{len(labels)} items cannot be {count} folds.")
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # one class after the other, each in random order
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(labels)) % count
    return fold


def choose(x: np.ndarray, y: np.ndarray, classes: int, cs: Sequence[float], count: int, tolerance: float) -> float:
    """The C of `cs` with the best mean accuracy over `count` folds, the smaller of equal ones."""
    of, right = folds(y, count), np.zeros(len(cs))
    for fold in range(count):
        fit = logistic.fit(x[of != fold], y[of != fold], cs, classes, tolerance=tolerance)
        right += [_right(logits, y[of == fold]).mean() for logits in fit.logits(x[of == fold])]
    return _best(dict(zip(cs, right.tolist(), strict=True)))


def nested(x: np.ndarray, y: np.ndarray, classes: int, cs: Sequence[float], count: int, tolerance: float) -> Fit:
    """SentEval's nested cross-validation: each fold is tested once, with the C that folds of the others choose."""
    of, right, chosen = folds(y, count), np.zeros(len(y)), []
    for fold in range(count):
        train, test = of != fold, of == fold
        chosen.append(choose(x[train], y[train], classes, cs, count, tolerance))
        fit = logistic.fit(x[train], y[train], [chosen[-1]], classes, tolerance=tolerance)
        right[test] = _right(fit.logits(x[test])[0], y[test])
    return right, {"log10_c": float(np.mean(np.log10(chosen)))}


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSet:
    """What a probe is trained, chosen and tested on; images or texts.

    Attributes:
      name: in the metrics' names.
      train, validation, test: items, as `Encoder.images` or `Encoder.texts` takes them; without validation items C is
        chosen on one training item in ten, drawn with seed 0.
      tasks: name ("" where there is but one) -> labels of the three, int (n,).
      parts: of the training set, "10%" or "5-shot"; each gives results of its own, means over 3 draws.
      sweep: of C.
      neighbours: whether nearest neighbours are tried too.
      folds: above 0, C is chosen among the sweep's `coarse` by so many folds of `train`; without `test` items those of
        `train` are tested, in as many folds (`nested`).
      pairs: where items are pairs of texts, what their features u and v are joined to: "difference" [|u - v|, u v],
        SentEval's, or "all" [u, v, |u - v|, u v], GLUE's baselines'.
      sgd: the linear probe is SLIP's, `sgd.fit`, on `train` and `validation` items.
      augmented: for `sgd`, epoch -> other views of those items; without it their features are those of one view.
    """

    evaluator: ClassVar[str] = "probe"

    name: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    tasks: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    parts: Sequence[str] = ()
    sweep: Sweep = Sweep()
    neighbours: bool = True
    folds: int = 0
    pairs: str = ""
    sgd: bool = False
    augmented: Callable[[int], Sequence[Any]] | None = None
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        sizes = (len(self.train), len(self.validation), len(self.test))
        for task, labels in self.tasks.items():
            if tuple(map(len, labels)) != sizes or not sizes[0] or not (sizes[2] or self.folds):
                raise UserError(f"{self.name}: {sizes} items and {tuple(map(len, labels))} labels {task!r} differ.")
            unseen = sorted(set(np.concatenate(labels[1:]).tolist()) - set(labels[0].tolist()))
            if unseen:
                raise UserError(f"{self.name}: classes {unseen} of {task or 'the task'} have no training item.")


class Probe(Evaluator):
    """Results of a linear probe and of kNN, in percent, named "visual/<set>[/<task>]/linear/top1" and ".../knn/top1".

    Beside them mean_per_class, of two classes f1 (of the second) and matthews, the C of the linear probe
    ("linear/log10_c"), n, train, ways, "majority" (what always naming the largest class gives) and for each part of the
    training set ".../linear/10%/top1". Texts are probed in the same way, under the family "textual".
    """

    layouts = (
        Layout(
            "frozen features, %",
            ("visual", "textual"),
            (
                Metric("linear/top1", "top1", "linear probe, top-1"),
                Metric("knn/top1", "top1", "nearest neighbours, top-1"),
            ),
            (
                Column("ways", "ways", ">6"),
                Column("items", "n", ">8"),
                Column("linear", "linear/top1", ">8", chance=">7"),
                Column("kNN", "knn/top1", ">8"),
            ),
        ),
    )

    def __init__(self, encoder: Encoder, data: ProbeSet, family: str = "") -> None:
        super().__init__(encoder, data)
        self.family = family or ("textual" if isinstance(data.train[0], (str, tuple)) else "visual")

    def measure(self, variables: Any) -> list[Result]:
        """Return the results that the class names."""
        features, results, others = self._features(variables), [], []
        for task, labels in self.data.tasks.items():
            tested = labels[2] if len(labels[2]) else labels[0]
            n, majority = len(tested), 100 * float(np.mean(tested == np.bincount(labels[0]).argmax()))
            for probe, (values, extra) in self._task(variables, features, labels).items():
                items = {"top1": PerExample(values), "mean_per_class": PerExample(values, class_weights(tested))}
                if max(map(np.max, (labels[0], tested))) == 1 and set(np.unique(values)) <= {0.0, 1.0}:
                    predicted = np.where(values == 1, tested, 1 - tested)
                    items |= {key: PerExample(predicted, other=tested, statistic=key) for key in ("f1", "matthews")}
                for key, item in items.items():
                    fields = {"task": task, "n": n, "items": item, "chance": majority if key == "top1" else None}
                    results.append(self.result(f"{probe}/{key}", item.value(), **fields))
                others += [self.count(f"{probe}/{key}", value, task=task) for key, value in extra.items()]
            sizes = {"n": n, "train": len(labels[0]), "ways": int(labels[0].max()) + 1}
            others += [self.count(key, value, task=task) for key, value in sizes.items()]
            others.append(self.result("majority", majority, task=task))
        return results + others

    def _features(self, variables: Any) -> list[np.ndarray]:
        """Features of the three parts."""
        sides = (self.data.train, self.data.validation, self.data.test)
        ends = np.cumsum([len(side) for side in sides])[:-1]
        # One pass for all three: the last batch of each would be filled up.
        if self.family == "visual":
            return np.split(self.encoder.images(variables, Joined(sides), ("features",))["features"], ends)
        texts = [item for side in sides for item in side]
        if not self.data.pairs:
            return np.split(self.encoder.texts(variables, texts, ("features",))["features"], ends)
        h = self.encoder.texts(variables, [text for pair in texts for text in pair], ("features",))["features"]
        u, v = h[::2], h[1::2]
        joined = [*((u, v) if self.data.pairs == "all" else ()), np.abs(u - v), u * v]
        return np.split(np.concatenate(joined, axis=1), ends)

    def _task(self, variables: Any, features: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Fit]:
        """{"linear": fit} for each way of probing."""
        classes, sweep, count = int(labels[0].max()) + 1, self.data.sweep, self.data.folds
        train, held, test = ((x, y) for x, y in zip(features, labels, strict=True))
        readable = [~np.isnan(x).any(axis=1) for x in features[:2]]
        # Pictures that cannot be read teach nothing. Of a model that diverged all rows are NaN, and all answers wrong.
        left_out = self.family == "visual" and readable[0].any() and not np.concatenate(readable).all()
        if left_out:
            train, held = (tuple(v[keep] for v in x) for x, keep in zip((train, held), readable, strict=True))
        both = (np.concatenate([train[0], held[0]]), np.concatenate([train[1], held[1]]))
        if count and not len(test[1]):
            return {"linear": nested(*train, classes, sweep.coarse, count, sweep.tolerance)}
        if count:
            c = choose(*train, classes, sweep.coarse, count, sweep.tolerance)
            return {"linear": linear(train, held, test, classes, Sweep((c,), 0, sweep.tolerance), self._score)}
        if self.data.sgd:
            kept = np.concatenate(readable) if left_out else slice(None)
            out = {"linear": (self._sgd(variables, both, test, classes, kept), {})}
        else:
            out = {"linear": linear(train, held, test, classes, sweep, self._score)}
        if self.data.neighbours:
            out["knn"] = (_right(knn(*both, test[0], classes), test[1]), {})
        for part in self.data.parts:
            runs = []
            for seed in range(_SEEDS):
                chosen = subset(train[1], part, seed)
                some = (train[0][chosen], train[1][chosen])
                runs.append(linear(some, held, test, classes, sweep, self._score, join=False)[0])
            out[f"linear/{part}"] = (np.mean(runs, axis=0), {})
        return out

    def _sgd(
        self,
        variables: Any,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        classes: int,
        kept: np.ndarray | slice,
    ) -> np.ndarray:
        def features(epoch: int) -> np.ndarray:
            if self.data.augmented is None:
                return train[0]
            return self.encoder.images(variables, self.data.augmented(epoch), ("features",))["features"][kept]

        weights, bias = sgd.fit(features, train[1], classes)
        return _right(test[0] @ weights + bias, test[1])

    def _score(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """What C is chosen by: the set's own metric."""
        weights = class_weights(labels) if self.data.card.metric.endswith("mean_per_class") else None
        return PerExample(_right(logits, labels), weights).value()


def linear(
    train: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
    sweep: Sweep,
    score: Callable[[np.ndarray, np.ndarray], float],
    *,
    join: bool = True,
) -> Fit:
    """CLIP's linear probe: C by `search` on `held`, then one fit on `train` and (if `join`) `held`, tested once.

    Without `held` items a tenth of `train`, one item or more, is held. Where one C is tried there is nothing to choose.

    Returns:
      Whether each test item is right, 0.0 or 1.0 (n,), and {"log10_c": the choice}.

    Raises:
      UserError: a C to choose, no `held` items, and fewer than two of `train`.
    """
    if not len(held[1]) and len(sweep.coarse) > 1 and len(train[1]) < 2:
        raise UserError(
            f"expected validation items, or at least 2 training items to hold one out and choose C; got "
            f"{len(train[1])} training item and no validation items."
        )
    if not len(held[1]):
        order = np.random.default_rng(0).permutation(len(train[1]))
        tenth = max(1, len(order) // 10)
        held, train = (tuple(v[part] for v in train) for part in (order[:tenth], order[tenth:]))
        join = True
    best = sweep.coarse[0]
    if len(sweep.coarse) > 1:
        best, _ = search(train, held, classes, sweep, score)
    both = tuple(np.concatenate(pair) for pair in zip(train, held, strict=True)) if join else train
    logits = logistic.fit(*both, [best], classes, tolerance=sweep.tolerance).logits(test[0])[0]
    return _right(logits, test[1]), {"log10_c": float(np.log10(best))}


def _right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1.0 where the highest, of equal ones the first, is the label; rows with NaN or plus infinity are wrong."""
    return ((logits.argmax(axis=1) == labels) & valid_rows(logits)).astype(float)


class Joined(Sequence):
    """Sequences one after another, without loading their items."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]
