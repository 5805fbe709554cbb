"""Visual and textual representation: linear probes, nearest neighbours, and the classifier of a fine-tuned model.

Probes use the pooled features before any projection, like the CLIP paper (arXiv 2103.00020, appendix A.3). All features
are copied to the host. Fitting runs on one device of each process, so the result does not depend on the mesh.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.evaluators.base import Column, Evaluator, Layout, joined
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.feature_classifiers import Fit, Sweep, choose, is_right, knn, linear, nested, together
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, class_weights, ranks
from xclip_jax.models.two_towers import Variables

_FROZEN = (
    Column("classes", "ways"),
    Column("items", "n"),
    Column("linear", "linear/top1", "linear probe, top-1", chance=True),
    Column("kNN", "knn/top1", "nearest neighbours, top-1"),
)
_LABELS = {"top1": "top-1", "matthews": "Matthews", "f1": "F1", "spearman": "Spearman", "pearson": "Pearson"}
_FINETUNED = (
    Column("items", "n"),
    *(Column(label, f"finetuned/{key}", f"fine-tuned, {label}") for key, label in _LABELS.items()),
)


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSet:
    """Training, validation and test items of a probe; images or texts.

    Attributes:
      train, validation, test: items for `Encoder.images` or `Encoder.texts`; without validation items C is chosen on a
        random tenth of the training items, with seed 0.
      tasks: {name: labels of the three parts, int (n,)}; a single task is named "".
      sweep: values of C.
      neighbours: whether to evaluate nearest neighbours too.
      folds: if above 0, the number of folds of `train` for choosing C among `sweep.coarse`; without `test` items the
        training items are tested by nested cross-validation with the same number of folds.
      pairs: features of a pair of texts with features u and v: "difference" is SentEval's [|u - v|, u v], "all" is
        [u, v, |u - v|, u v], like GLUE's baselines.
      together: int (n,), equal for dependent test items, such as drawings of one concept; None if all are independent.
    """

    evaluator: ClassVar[str] = "probe"

    name: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    tasks: Mapping[str, Sequence[np.ndarray]]
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    neighbours: bool = True
    folds: int = 0
    pairs: str = ""
    card: Provenance = dataclasses.field(default_factory=Provenance)
    together: np.ndarray | None = None


class Probe(Evaluator):
    """Accuracy of a linear probe and of kNN, in percent: "visual/<set>[/<task>]/linear/top1" and ".../knn/top1".

    Further results are mean_per_class; f1 (of class 1) and matthews for two classes; the C of the linear probe
    ("linear/log10_c"); n, train and ways, the number of classes; and "majority", the accuracy if the largest class is
    always predicted. Text probes have the family "textual".
    """

    layouts = (Layout("frozen features, %", _FROZEN),)

    def __init__(self, encoder: Encoder, data: ProbeSet) -> None:
        super().__init__(encoder, data)
        self.family = _family(data.train)

    def measure(self, variables: Variables) -> list[Result]:
        features = self._features(variables)
        results = []
        others = []
        for task, labels in self.data.tasks.items():
            tested = labels[2] if len(labels[2]) else labels[0]
            num_classes = _num_classes(labels)
            majority = 100 * float(np.mean(tested == np.bincount(labels[0]).argmax()))
            chance = {"top1": majority, "mean_per_class": 100 / len(np.unique(tested))}  # of a constant answer
            for probe, (values, extra) in self._task(features, labels).items():
                for key, item in _items(values, tested, num_classes).items():
                    results.append(self.result(f"{probe}/{key}", item, task=task, chance=chance.get(key)))
                others += [self.count(f"{probe}/{key}", value, task=task) for key, value in extra.items()]
            for key, size in (("n", len(tested)), ("train", len(labels[0])), ("ways", num_classes)):
                others.append(self.count(key, size, task=task))
            others.append(self.result("majority", majority, task=task))
        return results + others

    def _features(self, variables: Variables) -> list[np.ndarray]:
        sides = (self.data.train, self.data.validation, self.data.test)
        ends = np.cumsum([0, *map(len, sides)]).tolist()
        # One pass for all three: otherwise the last batch of each would be padded.
        if self.family == "visual":
            h = self.encoder.images(variables, joined(sides), ("features",))["features"]
            for first, last in itertools.pairwise(ends):
                self.encoder.check_unreadable(first, last)
            return np.split(h, ends[1:-1])
        texts = [item for side in sides for item in side]
        if self.data.pairs:
            texts = [text for pair in texts for text in pair]
        h = self.encoder.texts(variables, texts, ("features",))["features"]
        if self.data.pairs:
            u, v = h[::2], h[1::2]
            parts = [np.abs(u - v), u * v]
            h = np.concatenate([u, v, *parts] if self.data.pairs == "all" else parts, axis=1)
        return np.split(h, ends[1:-1])

    def _task(self, features: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Fit]:
        """Return {"linear": fit, "knn": fit, ...} of one task."""
        classes = _num_classes(labels)
        sweep = self.data.sweep
        count = self.data.folds
        train, validation, test = zip(features, labels, strict=True)
        finite = [np.isfinite(x).all(axis=1) for x in features[:2]]
        if not finite[0].any():  # the model diverged: all answers are wrong
            wrong = np.zeros(len(test[1]) or len(train[1])), {}
            return {"linear": wrong} | ({"knn": wrong} if self.data.neighbours and len(test[1]) else {})
        if not np.concatenate(finite).all():  # unreadable images are not trained on
            train, validation = ((x[keep], y[keep]) for (x, y), keep in zip((train, validation), finite, strict=True))
        if count and not len(test[1]):
            right = np.zeros(len(labels[0]))
            right[finite[0]], extra = nested(*train, classes, sweep.coarse, count, sweep.tolerance)
            return {"linear": (right, extra)}
        if count:
            sweep = Sweep((choose(*train, classes, sweep.coarse, count, sweep.tolerance),), 0, sweep.tolerance)
        fits = {"linear": linear(train, validation, test, classes, sweep, self._score)}
        if self.data.neighbours:
            fits["knn"] = (is_right(knn(*together(train, validation), test[0], classes), test[1]), {})
        return fits

    def _score(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return the criterion for C: the set's headline metric, or top1 if the probe lacks it."""
        items = _items(is_right(logits, labels), labels, logits.shape[1])
        return items.get(self.data.card.metric.rpartition("/")[2], items["top1"]).value()


def _family(items: Sequence[Any]) -> str:
    """Return "textual" for texts or tuples of texts, "visual" for images."""
    try:
        return "textual" if isinstance(items[0], (str, tuple)) else "visual"
    except BadSample:  # an undecodable image
        return "visual"


def _num_classes(labels: Sequence[np.ndarray]) -> int:
    """Return the number of classes, including those missing from the training items."""
    return int(np.concatenate(labels).max()) + 1


def _items(values: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, PerExample]:
    """Return {metric: per-example values}; `values` are 1.0 for right items."""
    items = {"top1": PerExample(values), "mean_per_class": PerExample(values, class_weights(labels))}
    if classes == 2:
        predicted = np.where(values == 1, labels, 1 - labels)
        items |= {key: PerExample(predicted, other=labels, statistic=key) for key in ("f1", "matthews")}
    return items


def renumber(labels: np.ndarray, names: Sequence[str], to: Sequence[str], spec: str) -> np.ndarray:
    """Map `labels`, int (n,), from positions in `names` to positions in `to`, the classes of training.

    `UserError`, beginning with `spec`, if the lists differ and `to` lacks an item's class or has two of one name.
    """
    if list(names) == list(to):
        return labels
    number = {name: i for i, name in enumerate(to)}
    unknown = [names[label] for label in np.unique(labels) if names[label] not in number]
    if unknown:
        remedy = f"give both the same classes, {to[0]!r} and so on"
        raise UserError(f"{spec} has the class {unknown[0]!r}, unlike the training items; {remedy}.")
    if len(number) < len(to):
        twice = next(name for i, name in enumerate(to) if number[name] != i)
        raise UserError(f"{spec} has other classes than the training items, two of which are {twice!r}; rename one.")
    return np.array([number.get(name, -1) for name in names])[labels]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationSet:
    """Labelled items for the classifier of a fine-tuned model."""

    evaluator: ClassVar[str] = "classifier"

    name: str
    items: Sequence[Any]  # images or texts for `Encoder.images` or `Encoder.texts`
    labels: np.ndarray  # classes int (n,), or targets of a regression fp32 (n,)
    classes: int  # their number; 1 for a regression
    card: Provenance = dataclasses.field(default_factory=Provenance)
    names: Sequence[str] = ()  # of the classes; empty for a regression


class ClassifierEvaluator(Evaluator):
    """Evaluate a fine-tuned classifier: "visual/<set>/finetuned/top1" in percent, or "textual/..." for texts.

    Classification has top1, top5 and mean_per_class, two classes also f1 and matthews; n, ways, and "majority", the
    accuracy if the largest class is always predicted. A regression has spearman, pearson and its number of "pairs".
    """

    layouts = (Layout("fine-tuned, %", _FINETUNED),)

    def __init__(self, encoder: Encoder, data: ClassificationSet) -> None:
        """Raise `UserError` without a classifier, or if it lacks the class of an item, see `renumber`."""
        if encoder.similarities:
            raise UserError(f"{data.name}: the model has no classifier; fine-tune it, or evaluate probe/SOURCE.")
        if encoder.classes and data.names:
            labels = renumber(data.labels, data.names, encoder.classes, data.name)
            data = dataclasses.replace(data, labels=labels, classes=len(encoder.classes), names=encoder.classes)
        super().__init__(encoder, data)
        self.family = _family(data.items)

    def measure(self, variables: Variables) -> list[Result]:
        encode = self.encoder.texts if self.family == "textual" else self.encoder.images
        logits = encode(variables, self.data.items, ("class_logits",)).get("class_logits", np.empty((0, 0)))
        known = logits.shape[1]
        if known != self.data.classes:
            raise UserError(f"{self.data.name} has {self.data.classes} classes, the model's classifier {known}.")
        labels = self.data.labels
        n = len(labels)
        results = []
        if self.data.classes == 1:
            for key in ("spearman", "pearson"):
                results.append(self.result(f"finetuned/{key}", PerExample(logits[:, 0], other=labels, statistic=key)))
            return [*results, self.count("pairs", n)]
        majority = 100 * float(np.bincount(labels).max() / n)
        for key, item in _items(is_right(logits, labels), labels, self.data.classes).items():
            chance = majority if key == "top1" else None
            results.append(self.result(f"finetuned/{key}", item, chance=chance))
        results.append(self.result("finetuned/top5", 100 * float((ranks(logits, labels) < 5).mean()), n=n))
        return [*results, self.count("n", n), self.count("ways", self.data.classes), self.result("majority", majority)]
