"""Visual and textual representation: linear probes and nearest neighbours on frozen features.

All use the pooled features, before any projection, as the CLIP paper does (arXiv 2103.00020, appendix A.3). They come
to the host whole; fitting runs on one device of each process, so that the result does not depend on the mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import environment
from xclip_jax.core.console import format_bytes
from xclip_jax.core.errors import UserError
from xclip_jax.data.labelled import item_name
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric, are_texts
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
from xclip_jax.evaluators.statistics import PerExample, class_weights
from xclip_jax.models.two_towers import Variables

_WIDTHS = {"": 1, "difference": 2, "all": 4}  # features of an item, in those of an image or text
_COPIES = 4  # of all features in memory at the peak, as measured with 80,000 items of 512 features
_SEEDS = 3  # random subsets of a training set, over which a part's results are means


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSet:
    """Training, validation and test items of a probe; images or texts.

    Attributes:
      name: in the metrics' names.
      train, validation, test: items, as `Encoder.images` or `Encoder.texts` takes them; without validation items C is
        chosen on one training item in ten, at random with seed 0.
      tasks: name ("" of a single one) -> labels of the three, int (n,).
      parts: of the training set, "10%" or "5-shot"; each has results of its own, means over 3 random subsets.
        `to_choose_c` says on which items C is chosen.
      sweep: of C.
      neighbours: whether nearest neighbours are evaluated too.
      folds: above 0, C is chosen among the sweep's `coarse` by this number of folds of `train`; without `test` items
        those of `train` are tested, in as many folds (`nested`).
      pairs: features of pairs of texts with features u and v: "difference" [|u - v|, u v], SentEval's, or "all"
        [u, v, |u - v|, u v], that of GLUE's baselines.
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

    Beside them mean_per_class, of two classes f1 (of the second) and matthews, the C of the linear probe
    ("linear/log10_c"), n, train, ways (number of classes), "majority" (accuracy of always predicting the largest class)
    and for each part of the training set ".../linear/10%/top1". Probes of texts have the family "textual".
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
        """Raise `UserError` where the features of all items, which take hours, would not fit into memory."""
        n = sum(len(part) for part in (self.data.train, self.data.validation, self.data.test))
        d = self.encoder.widths.get("img" if self.family == "visual" else "txt", 0) * _WIDTHS[self.data.pairs]
        needed, memory = 4 * n * d * _COPIES, environment.host_memory("MemTotal")
        if needed > memory:
            raise UserError(
                f"{self.data.name}: a probe of {n:,} items with {d:,} features each takes {format_bytes(needed)}, and "
                f"this machine has {format_bytes(memory)}; use a machine with more memory, or a smaller set."
            )

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class names."""
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
        # Images that cannot be read are not trained on. Of a model that diverged all rows are NaN, all answers wrong.
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
        # Parts are drawn of all items, so that a class has enough where one of them cannot be read.
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
        """Return the set's own metric, by which C is chosen; top1 where the probe has no such metric."""
        items = _items(is_right(logits, labels), labels, logits.shape[1])
        return items.get(self.data.card.metric.rpartition("/")[2], items["top1"]).value()


def _items(values: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, PerExample]:
    """Each item's part in the metrics; `values` are 1.0 where it is right, or how often it is in several fits."""
    items = {"top1": PerExample(values), "mean_per_class": PerExample(values, class_weights(labels))}
    if classes == 2 and set(np.unique(values)) <= {0.0, 1.0}:
        predicted = np.where(values == 1, labels, 1 - labels)
        items |= {key: PerExample(predicted, other=labels, statistic=key) for key in ("f1", "matthews")}
    return items


class Joined(Sequence):
    """Concatenation of sequences, without loading their items."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part, place = self._place(index)
        return part[place]

    def name(self, index: int) -> str:
        """Return what names an item to a person."""
        return item_name(*self._place(index))

    def _place(self, index: int) -> tuple[Sequence[Any], int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)
