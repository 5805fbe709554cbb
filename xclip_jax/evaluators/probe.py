"""Visual and textual representation: linear probes, nearest neighbours, and the classifier of a fine-tuned model.

Probes use the pooled features before any projection, as the CLIP paper does (arXiv 2103.00020, appendix A.3). The whole
features come to the host. Fitting runs on one device of each process, so the result does not depend on the mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import environment
from xclip_jax.core.console import format_bytes, log0
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.base import Column, Evaluator, Joined, Layout, Metric, are_texts
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.feature_classifiers import (
    Fit,
    Sweep,
    choose,
    is_right,
    knn,
    linear,
    nested,
    part_sizes,
    subset,
    to_choose_c,
    together,
)
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, class_weights, ranks
from xclip_jax.models.two_towers import Variables

_WIDTHS = {"": 1, "difference": 2, "all": 4}  # width of an item's features, in multiples of the tower's
_COPIES = 4  # of all features in memory at the peak, as measured with 80,000 items of 512 features
_FINETUNED = {"top1": "top-1", "matthews": "Matthews", "f1": "F1", "spearman": "Spearman", "pearson": "Pearson"}
_SEEDS = 3  # random subsets of a training set, over which a part's results are means


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSet:
    """Training, validation and test items of a probe; images or texts.

    Attributes:
      name: name of the set, in the names of its metrics.
      train, validation, test: items, as `Encoder.images` or `Encoder.texts` takes them; without validation items C is
        chosen on one training item in ten, at random with seed 0.
      tasks: {name: labels of the three parts, int (n,)}; a single task is named "".
      parts: parts of the training set, such as "10%" or "5-shot"; each has its own results, means over 3 random
        subsets. `to_choose_c` describes the items on which C is chosen.
      sweep: values of C.
      neighbours: whether to evaluate nearest neighbours too.
      folds: above 0, the number of folds of `train` that choose C among `sweep.coarse`; without `test` items the
        training items are tested by nested cross-validation with the same number of folds.
      pairs: features of a pair of texts with features u and v: "difference" is SentEval's [|u - v|, u v], "all" is
        [u, v, |u - v|, u v] as in GLUE's baselines.
    """

    evaluator: ClassVar[str] = "probe"

    name: str
    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    tasks: Mapping[str, Sequence[np.ndarray]]
    parts: Sequence[str] = ()
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    neighbours: bool = True
    folds: int = 0
    pairs: str = ""
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        sizes = (len(self.train), len(self.validation), len(self.test))
        for task, labels in self.tasks.items():
            if tuple(map(len, labels)) != sizes or not sizes[0] or not (sizes[2] or self.folds):
                raise UserError(
                    f"{self.name}: {sizes} training, validation and test items have {tuple(map(len, labels))} labels"
                    f"{f' of task {task!r}' if task else ''}; give one for each, and training and test items."
                )
            unseen = sorted(set(np.concatenate(labels[1:]).tolist()) - set(labels[0].tolist()))
            if unseen:
                of_task = f" of task {task!r}" if task else ""
                raise UserError(f"{self.name}: classes {unseen}{of_task} have no training item; leave their items out.")
            for part in self.parts:
                try:
                    part_sizes(labels[0], part)
                except UserError as error:
                    raise UserError(f"{self.name}: {error}") from error


class Probe(Evaluator):
    """Accuracy of a linear probe and of kNN, in percent: "visual/<set>[/<task>]/linear/top1" and ".../knn/top1".

    Further results are mean_per_class; f1 (of class 1) and matthews for two classes; the C of the linear probe
    ("linear/log10_c"); n, train and ways, the number of classes; "majority", the accuracy of always predicting the
    largest class; and ".../linear/10%/top1" for each part of the training set. Text probes have the family "textual".
    """

    layouts = (
        Layout(
            "frozen features, %",
            ("visual", "textual"),
            (
                Metric("linear/top1", "linear", "linear probe, top-1"),
                Metric("knn/top1", "kNN", "nearest neighbours, top-1"),
            ),
            (
                Column("classes", "ways", ">8"),
                Column("items", "n", ">8"),
                Column("linear", "linear/top1", ">8", chance=">7"),
                Column("kNN", "knn/top1", ">8"),
            ),
        ),
    )

    inputs = ("train", "validation", "test")

    def __init__(self, encoder: Encoder, data: ProbeSet, family: str = "") -> None:
        super().__init__(encoder, data)
        self.family = family or ("textual" if are_texts(data.train) else "visual")
        self._check_memory()

    def _check_memory(self) -> None:
        """Raise `UserError` if the features of all items, which take hours to compute, would not fit into memory."""
        n = sum(len(part) for part in (self.data.train, self.data.validation, self.data.test))
        d = self.encoder.widths.get("img" if self.family == "visual" else "txt", 0) * _WIDTHS[self.data.pairs]
        needed, memory = 4 * n * d * _COPIES, environment.host_memory("MemTotal")
        if needed > memory:
            raise UserError(
                f"{self.data.name}: a probe of {n:,} items with {d:,} features each takes {format_bytes(needed)}, and "
                f"this machine has {format_bytes(memory)}; use a machine with more memory, or a smaller set."
            )

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results listed in the class docstring."""
        features, results, others = self._features(variables), [], []
        for task, labels in self.data.tasks.items():
            tested, num_classes = labels[2] if len(labels[2]) else labels[0], int(labels[0].max()) + 1
            n, majority = len(tested), 100 * float(np.mean(tested == np.bincount(labels[0]).argmax()))
            chance = {"top1": majority, "mean_per_class": 100 / len(np.unique(tested))}  # of one answer to all
            for probe, (values, extra) in self._task(features, labels).items():
                for key, item in _items(values, tested, num_classes).items():
                    fields = {"task": task, "n": n, "items": item, "chance": chance.get(key)}
                    results.append(self.result(f"{probe}/{key}", item.value(), **fields))
                others += [self.count(f"{probe}/{key}", value, task=task) for key, value in extra.items()]
            sizes = {"n": n, "train": len(labels[0]), "ways": num_classes}
            others += [self.count(key, value, task=task) for key, value in sizes.items()]
            others.append(self.result("majority", majority, task=task))
        return results + others

    def _features(self, variables: Variables) -> list[np.ndarray]:
        """Return the features of training, validation and test items."""
        sides = (self.data.train, self.data.validation, self.data.test)
        ends = np.cumsum([len(side) for side in sides])[:-1]
        # One pass for all three: the last batch of each would be padded.
        if self.family == "visual":
            return np.split(self.encoder.images(variables, Joined(sides), ("features",))["features"], ends)
        texts = [item for side in sides for item in side]
        if not self.data.pairs:
            return np.split(self.encoder.texts(variables, texts, ("features",))["features"], ends)
        h = self.encoder.texts(variables, [text for pair in texts for text in pair], ("features",))["features"]
        u, v = h[::2], h[1::2]
        features = np.empty((len(u), _WIDTHS[self.data.pairs] * h.shape[1]), np.float32)
        *both, difference, product = np.split(features, _WIDTHS[self.data.pairs], axis=1)
        for part, value in zip(both, (u, v), strict=False):
            part[:] = value
        np.abs(np.subtract(u, v, out=difference), out=difference)
        np.multiply(u, v, out=product)
        return np.split(features, ends)

    def _task(self, features: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> dict[str, Fit]:
        """Return {"linear": fit, "knn": fit, ...} of one task."""
        classes, sweep, count = int(labels[0].max()) + 1, self.data.sweep, self.data.folds
        train, validation, test = ((x, y) for x, y in zip(features, labels, strict=True))
        readable = [~np.isnan(x).any(axis=1) for x in features[:2]]
        # Unreadable images are not trained on. If the model diverged all rows are NaN, and all answers are wrong.
        left_out = self.family == "visual" and readable[0].any() and not np.concatenate(readable).all()
        if left_out:
            train, validation = ((x[keep], y[keep]) for (x, y), keep in zip((train, validation), readable, strict=True))
        if count and not len(test[1]):
            return {"linear": nested(*train, classes, sweep.coarse, count, sweep.tolerance)}
        if count:
            c = choose(*train, classes, sweep.coarse, count, sweep.tolerance)
            return {"linear": linear(train, validation, test, classes, Sweep((c,), 0, sweep.tolerance), self._score)}
        fits = {"linear": linear(train, validation, test, classes, sweep, self._score)}
        if self.data.neighbours:
            fits["knn"] = (is_right(knn(*together(train, validation), test[0], classes), test[1]), {})
        # Draw parts from all items: a class then has enough of them even if some cannot be read.
        of_train = np.flatnonzero(readable[0]) if left_out else np.arange(len(labels[0]))
        for part in self.data.parts:
            runs = []
            for seed in range(_SEEDS):
                chosen = np.flatnonzero(np.isin(of_train, subset(labels[0], part, seed)))
                part_of_train, held = (train[0][chosen], train[1][chosen]), to_choose_c(train, chosen, validation, seed)
                runs.append(linear(part_of_train, held, test, classes, sweep, self._score, join=False)[0])
            fits[f"linear/{part}"] = (np.mean(runs, axis=0), {})
        return fits

    def _score(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """Return the set's headline metric, by which C is chosen; top1 if the probe lacks it."""
        items = _items(is_right(logits, labels), labels, logits.shape[1])
        return items.get(self.data.card.metric.rpartition("/")[2], items["top1"]).value()


def _items(values: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, PerExample]:
    """Return the per-example values of each metric; `values` are 1.0 for right items, or a mean over fits."""
    items = {"top1": PerExample(values), "mean_per_class": PerExample(values, class_weights(labels))}
    if classes == 2 and set(np.unique(values)) <= {0.0, 1.0}:
        predicted = np.where(values == 1, labels, 1 - labels)
        items |= {key: PerExample(predicted, other=labels, statistic=key) for key in ("f1", "matthews")}
    return items


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationSet:
    """Labelled items for the classifier of a fine-tuned model.

    Attributes:
      name: name of the set, in the names of its metrics.
      items: images or texts, as `Encoder.images` or `Encoder.texts` takes them.
      labels: classes int (n,), or targets of a regression fp32 (n,).
      classes: number of classes; 1 for a regression.
      names: names of the classes; empty for a regression.
    """

    evaluator: ClassVar[str] = "classifier"

    name: str
    items: Sequence[Any]
    labels: np.ndarray
    classes: int
    card: Provenance = dataclasses.field(default_factory=Provenance)
    names: Sequence[str] = ()

    def renumbered(self, names: Sequence[str]) -> "ClassificationSet":
        """Return the set with `names` as its classes; some of them may have no item.

        Raises:
          UserError: a class of the set is not among `names`.
        """
        if tuple(names) == tuple(self.names):
            return self
        number = {name: i for i, name in enumerate(names)}
        unknown = [name for name in self.names if name not in number]
        if unknown:
            shown = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"{self.name}: class {unknown[0]!r} is not among the {len(names)} classes that the model was "
                f"fine-tuned on ({shown}); test it on items of those classes."
            )
        labels = np.array([number[name] for name in self.names])[self.labels]
        return dataclasses.replace(self, labels=labels, classes=len(names), names=tuple(names))


class ClassifierEvaluator(Evaluator):
    """Evaluate a fine-tuned classifier: "visual/<set>/finetuned/top1" in percent, or "textual/..." for texts.

    Classification has top1, top5 and mean_per_class, two classes also f1 and matthews; n, ways, and "majority", the
    accuracy of always predicting the largest class. A regression has spearman, pearson and its number of "pairs".
    """

    layouts = (
        Layout(
            "fine-tuned, %",
            ("visual", "textual"),
            tuple(Metric(f"finetuned/{key}", key, f"fine-tuned, {label}") for key, label in _FINETUNED.items()),
        ),
    )

    def __init__(self, encoder: Encoder, data: ClassificationSet) -> None:
        """Raise `UserError` if the set has a class that the model's classifier lacks."""
        if data.names and not encoder.classes:
            log0(
                f"WARNING: {data.name}: the names of the model's classes are unknown; assuming the set's classes, in "
                "its order"
            )
        super().__init__(encoder, data.renumbered(encoder.classes) if encoder.classes and data.names else data)
        self.images = not are_texts(data.items)
        self.family = "visual" if self.images else "textual"

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results listed in the class docstring."""
        encode = self.encoder.images if self.images else self.encoder.texts
        logits = encode(variables, self.data.items, ("class_logits",)).get("class_logits")
        if logits is None or logits.shape[1] != self.data.classes:
            model = "no classifier" if logits is None else f"a classifier of {logits.shape[1]} classes"
            raise UserError(f"{self.data.name} has {self.data.classes} classes and the model {model}; see finetune.py.")
        labels, n = self.data.labels, len(self.data.labels)
        if self.data.classes == 1:
            items = {key: PerExample(logits[:, 0], other=labels, statistic=key) for key in ("spearman", "pearson")}
            results = [
                self.result(f"finetuned/{key}", x.value(), unit="x 100", n=n, items=x) for key, x in items.items()
            ]
            return [*results, self.count("pairs", n)]
        majority = 100 * float(np.bincount(labels).max() / n)
        items = _items(is_right(logits, labels), labels, self.data.classes)
        results = []
        for key, item in items.items():
            chance = majority if key == "top1" else None
            results.append(self.result(f"finetuned/{key}", item.value(), n=n, items=item, chance=chance))
        results.append(self.result("finetuned/top5", 100 * float((ranks(logits, labels) < 5).mean()), n=n))
        return [*results, self.count("n", n), self.count("ways", self.data.classes), self.result("majority", majority)]
