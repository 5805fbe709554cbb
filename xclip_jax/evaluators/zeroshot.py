"""Zero-shot classification: an image gets the class with the nearest texts, by each similarity of the model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.base import Column, Evaluator, Layout
from xclip_jax.evaluators.encoder import Encoder, Features
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, class_weights, ranks
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import CosineSimilarity, Similarity, features

__all__ = ("accuracy", "classifier", "mean_per_class")  # documented; all other names may change


def classifier(text_embeddings: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return class vectors, fp32 (classes, e): prompt embeddings, normalised, averaged, and normalised again.

    `text_embeddings` are one array (prompts, e) per class, or one array (classes, prompts, e).

    Example:
      >>> import numpy as np
      >>> from xclip_jax.evaluators.zeroshot import classifier
      >>> classifier(np.array([[[2.0, 0.0], [0.0, 3.0]]])).round(3)  # one class with two prompts
      array([[0.707, 0.707]], dtype=float32)
    """
    cosine = CosineSimilarity()
    return np.stack([cosine.class_row(np.asarray(prompts, np.float32)) for prompts in text_embeddings])


def accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return top-k accuracy, from 0 to 1; equal logits rank by class index, lowest first.

    `logits` are (n, classes), of any scale, and `labels` class indices (n,). Images without a valid ranking, see
    `statistics.ranks`, are wrong for every k.

    Example:
      >>> import numpy as np
      >>> from xclip_jax.evaluators.zeroshot import accuracy
      >>> logits = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
      >>> accuracy(logits, np.array([0, 1]), k=1), accuracy(logits, np.array([0, 1]), k=2)
      (0.5, 1.0)
    """
    return float((ranks(np.asarray(logits), np.asarray(labels)) < k).mean())


def mean_per_class(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return balanced accuracy, from 0 to 1: the mean accuracy over the occurring classes.

    Example:
      >>> import numpy as np
      >>> from xclip_jax.evaluators.zeroshot import mean_per_class
      >>> mean_per_class(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), np.array([0, 0, 1]))  # always class 0
      0.5
    """
    labels = np.asarray(labels)
    right = ranks(np.asarray(logits), labels) < 1
    return float(np.average(right, weights=class_weights(labels)))


def compare(
    similarities: Sequence[Similarity], img: Features, rows: Sequence[np.ndarray], spreads: Sequence[float] = ()
) -> dict[str, np.ndarray]:
    """Compare images with texts or classes by all similarities of a model: {score: (n, m)}.

    Args:
      similarities: the model's similarities, its default first.
      img: the similarities' features of n images.
      rows: m texts or classes for each similarity.
      spreads: standard deviations of the first two logits in the whole set if this is only a part of it, else empty.

    Returns:
      Score "" is the first score of the default similarity, for tables. The others are named by their similarity; an
      unnamed score has the similarity's name. Two or more similarities add "both", the sum of the first two logits,
      each divided by its standard deviation [ours]. Unreadable images, with features NaN, have minus infinity.
    """
    unreadable = np.isnan(img[similarities[0].feature]).any(axis=1)
    partly = unreadable.any() and not unreadable.all()  # a diverged model keeps its NaN
    scores: dict[str, np.ndarray] = {}
    logits: list[np.ndarray] = []
    for similarity, texts in zip(similarities, rows, strict=True):
        own = similarity.scores(img[similarity.feature], texts)
        logits.append(own[similarity.logits])
        if not scores:
            scores[""] = next(iter(own.values()))
        scores |= {name or similarity.name: x for name, x in own.items() if name or len(logits) > 1}
    if len(logits) > 1:
        if not spreads:
            counted = [x[~unreadable] if partly else x for x in logits[:2]]
            spreads = [x.std() if x.size else 1.0 for x in counted]
        first, second = (x / (spread or 1.0) for x, spread in zip(logits[:2], spreads, strict=True))
        scores["both"] = first + second
    if partly:
        for x in scores.values():
            x[unreadable] = -np.inf
    return scores


def class_scores(
    similarities: Sequence[Similarity], img: Features, txt: Features, counts: Sequence[int]
) -> dict[str, np.ndarray]:
    """`compare` images with classes; `txt` are the features of all prompts, `counts` their number per class."""
    ends = np.cumsum(counts)[:-1]
    rows = [
        np.stack([similarity.class_row(similarity.rows(part)) for part in np.split(txt[similarity.feature], ends)])
        for similarity in similarities
    ]
    return compare(similarities, img, rows)


def encode_pairs(
    encoder: Encoder, variables: Variables, images: Sequence[np.ndarray], texts: Sequence[str]
) -> tuple[Features, list[np.ndarray]]:
    """Return the images' features and the texts' rows for `compare`."""
    similarities = encoder.similarities
    img = encoder.images(variables, images, features(similarities))
    txt = encoder.texts(variables, texts, features(similarities))
    # The texts' features, which may be gigabytes, are not kept.
    return img, [similarity.rows(txt[similarity.feature]) for similarity in similarities]


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotSet:
    """Labelled images and the texts of their classes.

    Attributes:
      images: `len` and `[]`, uint8 (size, size, 3).
      labels: int (n,), or bool (n, classes) if an image may have several classes.
      prompts: texts of each class, from filled templates; classes may share texts.
      groups: bool (n,) of named parts, such as vendors; the set's value is then their unweighted mean.
      names: readable names of the classes; by default their first prompts.
      card: provenance; the metrics "roc_auc" (two classes) and "top1_top5" are measured if `card.metric` names them.
      together: int (n,), equal for dependent images, such as drawings of one concept; None if all are independent.
    """

    evaluator: ClassVar[str] = "zeroshot"

    name: str
    images: Sequence[np.ndarray]
    labels: np.ndarray
    prompts: list[list[str]]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    card: Provenance = dataclasses.field(default_factory=Provenance)
    together: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        shape = (n, len(self.prompts))[: max(np.ndim(self.labels), 1)]
        if not n or np.shape(self.labels) != shape or not all(np.any(mask) for mask in self.groups.values()):
            raise UserError(
                f"{self.name}: {n} images, {np.size(self.labels)} labels, groups {', '.join(self.groups) or 'none'}; "
                "give one label per image, and leave out groups without images."
            )
        object.__setattr__(self, "names", list(self.names) or [prompts[0] for prompts in self.prompts])


SCORES = {"cosine": "clusters, cosine", "cross_entropy": "clusters, cross-entropy", "both": "both heads together"}
_SIZES = (Column("classes", "ways"), Column("images", "n"))
_TOPS = (Column("top-1", "top1", "top-1", chance=True), Column("top-5", "top5", "top-5", chance=True))
_PRECISIONS = (Column("11-point mAP", "map11", "11-point mAP"), Column("mAP", "map", "mAP"))


class ZeroShot(Evaluator):
    """top1, top5 and mean_per_class in percent, n and ways, named "zeroshot/<set>[/<score>][/<group>]/<metric>".

    `compare` names the scores. Images with several classes have map (mean `average_precision` over classes) and map11
    (`eleven_point`) instead.
    """

    family = "zeroshot"
    layouts = (
        Layout("zero-shot classification, %", (*_SIZES, *_TOPS), SCORES),
        Layout("zero-shot, several labels an image, %", (*_SIZES, *_PRECISIONS)),
    )

    def scores(self, variables: Variables) -> dict[str, np.ndarray]:
        """Return {score: (n, num_classes)}."""
        # Score classes with equal prompts once: a matrix product may round equal columns differently, breaking ties.
        rows = {prompts: i for i, prompts in enumerate(dict.fromkeys(map(tuple, self.data.prompts)))}
        similarities = self.encoder.similarities
        img = self.encoder.images(variables, self.data.images, features(similarities))
        txt = self.encoder.texts(variables, [text for prompts in rows for text in prompts], features(similarities))
        scores = class_scores(similarities, img, txt, [len(prompts) for prompts in rows])
        if len(rows) == len(self.data.prompts):
            return scores
        classes = [rows[tuple(prompts)] for prompts in self.data.prompts]
        return {score: x[:, classes] for score, x in scores.items()}

    def measure(self, variables: Variables) -> list[Result]:
        labels = np.asarray(self.data.labels)
        groups = self.data.groups
        num_classes = len(self.data.prompts)
        results = [self.count("n", len(labels)), self.count("ways", num_classes)]
        results += [self.count("n", np.sum(mask), group=group) for group, mask in groups.items()]
        for score, scores in self.scores(variables).items():
            if labels.ndim == 2:
                for key in ("map", "map11"):
                    results.append(self.result(key, PerExample(scores, other=labels, statistic=key), score=score))
                continue
            rank = ranks(scores, labels)
            items = _items(rank, labels, groups)
            if self.data.card.metric == "roc_auc":
                with np.errstate(invalid="ignore"):  # unreadable images are NaN
                    items["roc_auc"] = PerExample(scores[:, 1] - scores[:, 0], other=labels == 1, statistic="roc_auc")
            if self.data.card.metric == "top1_top5":
                items["top1_top5"] = PerExample((items["top1"].values + items["top5"].values) / 2)
            chance = {f"top{k}": 100 * min(k / num_classes, 1) for k in (1, 5)}
            chance |= {"mean_per_class": chance["top1"], "top1_top5": (chance["top1"] + chance["top5"]) / 2}
            for key, item in items.items():
                results.append(self.result(key, item, chance=chance.get(key), score=score))
            for group, mask in groups.items():
                fields = {"n": int(np.sum(mask)), "score": score, "group": group}
                for key, item in _items(rank[mask], labels[mask], {}).items():
                    results.append(self.result(key, item.value(), chance=chance.get(key), **fields))
            results += self.results_of_ranks(score, rank)
        return results

    def results_of_ranks(self, score: str, rank: np.ndarray) -> list[Result]:
        """Return a subclass's additional results of a score, from the ranks of the right classes, int (n,), from 0."""
        return []


def _items(rank: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, PerExample]:
    """Return {metric: per-image values}, with equal weights for all groups."""
    even = None
    classes = class_weights(labels)
    if groups:
        even = sum(mask / mask.sum() for mask in groups.values())
        classes = np.zeros(len(labels))
    for mask in groups.values():
        of_class = class_weights(labels[mask])
        classes[mask] += of_class / of_class.sum()
    return {
        "top1": PerExample((rank < 1).astype(float), even),
        "top5": PerExample((rank < 5).astype(float), even),
        "mean_per_class": PerExample((rank < 1).astype(float), classes),
    }
