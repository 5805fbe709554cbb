"""Evaluation of the classifier of a fine-tuned model on labelled items, whose classes are matched by their names."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.base import Evaluator, Layout, Metric, are_texts
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, class_weights
from xclip_jax.evaluators.zeroshot import accuracy
from xclip_jax.models.two_towers import Variables

_LABELS = {"top1": "top-1", "matthews": "Matthews", "f1": "F1", "spearman": "Spearman", "pearson": "Pearson"}


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationSet:
    """Items and their labels.

    Attributes:
      name: in the metrics' names.
      items: as `Encoder.images` or `Encoder.texts` takes them.
      labels: classes int (n,), or numbers fp32 (n,).
      classes: number of them; 1 where labels are numbers.
      names: of the classes; none where labels are numbers.
    """

    evaluator: ClassVar[str] = "classifier"

    name: str
    items: Sequence[Any]
    labels: np.ndarray
    classes: int
    card: Provenance = dataclasses.field(default_factory=Provenance)
    names: Sequence[str] = ()

    def renumbered(self, names: Sequence[str]) -> "ClassificationSet":
        """The set with `names` as its classes, of which it may lack some.

        Raises:
          UserError: a class of the set that is not among them.
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
    """Results in percent, named "visual/<set>/finetuned/top1", or "textual/..." for texts.

    Of classes top1, top5 and mean_per_class, of two of them also f1 and matthews, beside n, ways and "majority", what
    always naming the largest class gives; of numbers spearman and pearson, beside their number "pairs".
    """

    layouts = (
        Layout(
            "fine-tuned, %",
            ("visual", "textual"),
            tuple(Metric(f"finetuned/{key}", key, f"fine-tuned, {label}") for key, label in _LABELS.items()),
        ),
    )

    def __init__(self, encoder: Encoder, data: ClassificationSet) -> None:
        """Raises `UserError` where the set has a class that the model's classifier does not know."""
        if data.names and not encoder.classes:
            log0(
                f"WARNING: {data.name}: the names of the model's own classes are not known; they are taken to be those "
                "of the set, in its order"
            )
        super().__init__(encoder, data.renumbered(encoder.classes) if encoder.classes and data.names else data)
        self.images = not are_texts(data.items)
        self.family = "visual" if self.images else "textual"

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class names."""
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
        right = (logits.argmax(axis=1) == labels) & np.isfinite(logits).all(axis=1)
        items = {
            "top1": PerExample(right.astype(float)),
            "mean_per_class": PerExample(right.astype(float), class_weights(labels)),
        }
        if self.data.classes == 2:
            predicted = np.where(right, labels, 1 - labels)
            items |= {key: PerExample(predicted, other=labels, statistic=key) for key in ("f1", "matthews")}
        results = []
        for key, item in items.items():
            chance = majority if key == "top1" else None
            results.append(self.result(f"finetuned/{key}", item.value(), n=n, items=item, chance=chance))
        results.append(self.result("finetuned/top5", 100 * accuracy(logits, labels, 5), n=n))
        return [*results, self.count("n", n), self.count("ways", self.data.classes), self.result("majority", majority)]
