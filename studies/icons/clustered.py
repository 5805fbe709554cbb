"""Protocols of the drawings: zero-shot classification with the geometric mean rank, and probes of new concepts.

Drawings of one concept are right or wrong together, so concepts are resampled (`together`): an interval that treats
drawings as independent has a third of the true width.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import logistic
from xclip_jax.evaluators.base import Column, Evaluator, joined
from xclip_jax.evaluators.feature_classifiers import is_right, knn
from xclip_jax.evaluators.probe import Probe
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.retrieval import Retrieval, TextRetrieval
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.models.two_towers import Variables

_HERE = "studies.icons.clustered"
_SEEDS = 3  # draws of a few-shot training set
_WITH_RANK = dataclasses.replace(
    ZeroShot.layouts[0],
    title="zero-shot classification of concepts, %",
    columns=(*ZeroShot.layouts[0].columns, Column("rank", "rank_gmean", "geometric mean rank", chance=True)),
)


@dataclasses.dataclass(frozen=True, eq=False)
class ClusteredZeroShotSet(ZeroShotSet):
    """A `ZeroShotSet` whose results have the geometric mean rank."""

    evaluator: ClassVar[str] = f"{_HERE}:ClusteredZeroShot"


class ClusteredZeroShot(ZeroShot):
    """`ZeroShot`, and "rank_gmean": the geometric mean over images of the right class's rank, from 1; less is better.

    It moves before top-1 does. An image without a valid ranking has the last rank.
    """

    layouts = (_WITH_RANK,)

    def results_of_ranks(self, score: str, rank: np.ndarray) -> list[Result]:
        """Return "rank_gmean"."""
        ways = len(self.data.prompts)
        items = PerExample((np.minimum(rank, ways - 1) + 1).astype(float), statistic="gmean")
        chance = float(np.exp(np.log(np.arange(1, ways + 1)).mean()))
        fields = {"unit": "rank", "n": len(rank), "chance": chance, "items": items, "score": score}
        return [self.result("rank_gmean", items.value(), **fields)]


# By the names in records of the first study.
ClusteredRetrieval, ClusteredTextRetrieval, ClusteredProbe = Retrieval, TextRetrieval, Probe


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Classes to learn from some images and to recognise in others.

    Attributes:
      train, test: images, as `Encoder.images` takes them.
      labels: class of each image of both, int (n,) and (m,); both have all classes.
    """

    train: Sequence[np.ndarray]
    test: Sequence[np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class TransferProbeSet:
    """Linear, kNN and few-shot probes whose hyperparameters are selected on a disjoint set of classes.

    Attributes:
      name: in the metrics' names.
      tuning: the task that C is chosen on.
      task: the task that is measured.
      cs: values of C, ascending.
      shots: training images of each class, for few-shot probes; results are means over three draws.
      k, temperature: of nearest neighbours, see `probe.knn`.
    """

    evaluator: ClassVar[str] = f"{_HERE}:TransferProbe"

    name: str
    tuning: Task
    task: Task
    cs: Sequence[float]
    shots: Sequence[int] = ()
    k: int = 10
    temperature: float = 0.07
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for task in (self.tuning, self.task):
            sizes = [len(task.train), len(task.test)]
            if [len(labels) for labels in task.labels] != sizes or not all(sizes):
                raise UserError(f"{self.name}: {sizes} images and {[len(x) for x in task.labels]} labels differ.")
            if set(task.labels[0].tolist()) != set(task.labels[1].tolist()):
                raise UserError(f"{self.name}: training and test images must have the same classes.")


class TransferProbe(Evaluator):
    """ "visual/<set>/linear/top1", ".../knn/top1", ".../linear/4-shot/top1" in percent, n, train, ways and log10_c.

    Features before any projection; logistic regression on standardised features; items are resampled by class.
    """

    family = "visual"
    layouts = Probe.layouts

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class names."""
        task, tuning = self.data.task, self.data.tuning
        parts = [tuning.train, tuning.test, task.train, task.test]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        h = np.split(self.encoder.images(variables, joined(parts), ("features",))["features"], ends)
        c = self._choose(h[0], h[1], tuning.labels)
        train, test = task.labels
        ways, n = int(train.max()) + 1, len(test)
        right = {
            "linear": _linear(h[2], train, h[3], test, [c])[0],
            "knn": is_right(knn(h[2], train, h[3], ways, self.data.k, self.data.temperature), test),
        }
        for shots in self.data.shots:
            draws = [_few(train, shots, seed) for seed in range(_SEEDS)]
            fits = [_linear(h[2][some], train[some], h[3], test, [c])[0] for some in draws]
            right[f"linear/{shots}-shot"] = np.mean(fits, axis=0)
        results, chance = [], 100 / ways
        for probe, values in right.items():
            items = PerExample(values, groups=test)
            results.append(self.result(f"{probe}/top1", items.value(), n=n, chance=chance, items=items))
        counts = {"linear/log10_c": np.log10(c), "n": n, "train": len(train), "ways": ways}
        return [*results, *(self.count(key, value) for key, value in counts.items())]

    def _choose(self, train: np.ndarray, test: np.ndarray, labels: tuple[np.ndarray, np.ndarray]) -> float:
        """The best C on the tuning task, the smaller of equal ones."""
        right = [values.mean() for values in _linear(train, labels[0], test, labels[1], self.data.cs)]
        return self.data.cs[int(np.argmax(right))]


def _few(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Sorted indices of `shots` random items of each class."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([rng.permutation(items)[:shots] for items in classes]))


def _linear(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, cs: Sequence[float]
) -> list[np.ndarray]:
    """Whether each test item is right under the regression of each C, 0.0 or 1.0 (n,)."""
    mean, deviation = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-6)
    fit = logistic.fit((train - mean) / deviation, train_labels, list(cs), int(train_labels.max()) + 1, tolerance=1e-4)
    return [is_right(logits, test_labels) for logits in fit.logits((test - mean) / deviation)]
