"""Zero-shot classification: an image gets the class whose texts are nearest.

Models with a projection are scored by the cosine of embeddings, after CLIP (arXiv 2103.00020). Models with cluster
heads are scored by their distributions too, in two ways side by side [ours]: see `cluster_scores`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.errors import UserError
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric
from xclip_jax.evaluators.encoder import Features
from xclip_jax.evaluators.provenance import Provenance
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.statistics import PerExample, class_weights, valid_rows

_TINY = float(np.finfo(np.float32).tiny)
# Distributions at once, fp32, of images and of texts: a set of 50,000 images with 32,768 clusters is 6.6 GB. Those of
# images are made again for each block of texts, which therefore are the larger blocks.
_IMAGES, _TEXTS = 1 << 22, 1 << 25


def classifier(text_embeddings: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Class vectors of prompts' embeddings: each normalised, averaged over prompts, normalised again.

    Args:
      text_embeddings: for each class an array (prompts, e), or one array (classes, prompts, e).

    Returns:
      fp32 (classes, e), rows of unit length.
    """
    means = [_unit(np.asarray(prompts, np.float32)).mean(axis=0) for prompts in text_embeddings]
    return _unit(np.stack(means))


def accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of images whose class is among the k highest; equal logits count for the lowest class index.

    Args:
      logits: scores (n, classes), any scale.
      labels: class indices (n,).
      k: where it is at least the number of classes, every image is right, but for those without a valid ranking: with
        a score that is NaN or plus infinity, or minus infinity for the right class.
    """
    return float((_ranks(logits, labels) < k).mean())


def mean_per_class(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their images that are right (balanced accuracy)."""
    labels = np.asarray(labels)
    right = np.bincount(labels, weights=_ranks(logits, labels) < 1)
    count = np.bincount(labels)
    return float((right[count > 0] / count[count > 0]).mean())


def distributions(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """softmax(logits / tau) over the last axis; (..., k) -> fp32 (..., k)."""
    p = np.asarray(logits, np.float32) / tau
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def cluster_scores(s: np.ndarray, q: np.ndarray, tau: float = 1.0) -> dict[str, np.ndarray]:
    """Scores of images against classes or captions by their distributions over clusters; higher is nearer [ours].

    Args:
      s: cluster logits (n, k) of images, whose distributions are p = softmax(s / tau).
      q: distributions (m, k) of texts.
      tau: temperature.

    Returns:
      Two fp32 arrays (n, m): "cosine" of p and q, and "cross_entropy", the negative symmetric cross-entropy
      1/2 sum_k (p log q + q log p) in nats.
    """
    (n, k), m = s.shape, len(q)
    scores = {key: np.empty((n, m), np.float32) for key in ("cosine", "cross_entropy")}
    rows, columns = max(1, _IMAGES // k), max(1, _TEXTS // k)
    for column in range(0, m, columns):
        texts = q[column : column + columns]
        length, log_q = np.linalg.norm(texts, axis=1), _log(texts)
        for row in range(0, n, rows):
            block = np.s_[row : row + rows, column : column + columns]
            p = distributions(s[row : row + rows], tau)
            scores["cosine"][block] = _unit(p) @ texts.T / length
            scores["cross_entropy"][block] = 0.5 * (p @ log_q.T + _log(p) @ texts.T)
    return scores


def _log(p: np.ndarray) -> np.ndarray:
    """log p, finite: exp underflows to 0 where softmax is sharp, and 0 log 0 must be 0."""
    x = np.maximum(p, _TINY)
    return np.log(x, out=x)


def similarities(img: Features, z_txt: np.ndarray | None, q: np.ndarray | None, tau: float) -> dict[str, np.ndarray]:
    """Every score that a model gives: {kind: (n, m)}.

    Args:
      img: "z" (n, e) and "s" (n, k) of images, as far as the model has them.
      z_txt: unit vectors (m, e) of classes or captions, or None without projection.
      q: distributions (m, k) of the same, or None without cluster heads.
      tau: temperature of the images' distributions.

    Returns:
      Kind "" is the one that tables show: cosine of z, or of the distributions where there is no projection. With
      cluster heads also "cosine" and "cross_entropy", of `cluster_scores`; with projection and cluster heads, as xCLIP
      has them, "both", the sum of "" and "cross_entropy", each over its standard deviation [ours]. Images whose
      features are NaN, as those of unreadable ones are, have minus infinity.
    """
    unreadable = np.isnan(img["s" if z_txt is None else "z"]).any(axis=1)
    any_unreadable = unreadable.any() and not unreadable.all()  # a model that diverged keeps its NaN
    scores = {} if z_txt is None else {"": img["z"] @ z_txt.T}
    if q is not None:
        by_cluster = cluster_scores(img["s"], q, tau)
        if scores:
            both = scores[""], by_cluster["cross_entropy"]
            by_cluster["both"] = sum(x / max((x[~unreadable] if any_unreadable else x).std(), _TINY) for x in both)
        scores = {"": by_cluster["cosine"]} | scores | by_cluster
    if any_unreadable:
        for x in scores.values():
            x[unreadable] = -np.inf
    return scores


def class_scores(img: Features, txt: Features, counts: Sequence[int], tau: float) -> dict[str, np.ndarray]:
    """`similarities` of images and classes, each class the mean of its prompts.

    Args:
      img: "z" and "s" of images, as far as the model has them.
      txt: the same of all prompts, class after class.
      counts: prompts of each class.
      tau: temperature of the distributions.
    """
    ends = np.cumsum(counts)[:-1]
    z = classifier(np.split(txt["z"], ends)) if "z" in txt else None
    q = None
    if "s" in txt:
        q = np.stack([distributions(s, tau).mean(axis=0) for s in np.split(txt["s"], ends)])
    return similarities(img, z, q, tau)


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotSet:
    """Labelled images and the texts of their classes.

    Attributes:
      name: in the metrics' names.
      images: `len` and `[]`, uint8 (size, size, 3).
      labels: class of each image, int (n,); or, where several classes may hold for one image, bool (n, classes).
      prompts: for each class its texts, templates filled in; classes may share texts.
      groups: bool (n,) of named parts, such as one for each vendor; the set's value is then their unweighted mean.
      names: of the classes, for people to read; by default their first prompts.
      coarse: of each class a coarser one that it is part of, for people to read; may be empty.
      card: where the set is from; its `metric` "roc_auc" (two classes) and "top1_top5" add that one to the others.
    """

    evaluator: ClassVar[str] = "zeroshot"

    name: str
    images: Sequence[np.ndarray]
    labels: np.ndarray
    prompts: list[list[str]]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    card: Provenance = dataclasses.field(default_factory=Provenance)
    coarse: Sequence[str] = ()

    def __post_init__(self) -> None:
        n, ways = len(self.images), len(self.prompts)
        several = np.ndim(self.labels) == 2
        if not n or np.shape(self.labels) != ((n, ways) if several else (n,)):
            raise UserError(f"{self.name}: {n} images, {np.size(self.labels)} labels; give one label for each image.")
        if several and (self.groups or not all(self.prompts)):
            raise UserError(f"{self.name}: several labels an image exclude groups, and want a prompt a class.")
        if not several and self.card.metric == "roc_auc" and ways != 2:
            raise UserError(f"{self.name}: ROC AUC is of two classes; the set has {ways}.")
        if several:
            pass
        elif np.min(self.labels) < 0 or np.max(self.labels) >= ways or not all(self.prompts):
            raise UserError(f"{self.name}: labels must be below {ways}, the number of classes, each with a prompt.")
        for words in (self.names, self.coarse):
            if len(words or self.prompts) != ways:
                raise UserError(f"{self.name}: {len(words)} names for {ways} classes; give each one a name, or none.")
        for group, mask in self.groups.items():
            if np.shape(mask) != (n,) or not np.any(mask):
                raise UserError(f"{self.name}: group {group!r} must be a bool for each of {n} images, not all False.")
        object.__setattr__(self, "names", list(self.names) or [prompts[0] for prompts in self.prompts])


LAYOUTS = (
    Layout(
        "zero-shot classification, %",
        ("zeroshot",),
        (Metric("top1", "top1", "top-1"), Metric("top5", "top5", "top-5")),
        (
            Column("ways", "ways", ">6"),
            Column("images", "n", ">8"),
            Column("top-1", "top1", ">8", chance=">7"),
            Column("top-5", "top5", ">8", chance=">7"),
        ),
        scores={
            "cosine": "clusters, cosine",
            "cross_entropy": "clusters, cross-entropy",
            "both": "both heads together",
        },
        reference="imagenet",
    ),
    Layout(
        "zero-shot, several labels an image, %",
        ("zeroshot",),
        (Metric("map11", "map11", "11-point mAP"), Metric("map", "map", "mAP")),
        (
            Column("ways", "ways", ">6"),
            Column("images", "n", ">8"),
            Column("11-point mAP", "map11", ">15"),
            Column("mAP", "map", ">8"),
        ),
    ),
)


class ZeroShot(Evaluator):
    """top1, top5 and mean_per_class in percent, n and ways, named "zeroshot/<set>[/<score>][/<group>]/<metric>".

    Scores are those of `similarities`. Where several classes hold for an image it is map (mean over the classes of
    `average_precision`) and map11 (of `eleven_point`) instead.
    """

    family = "zeroshot"
    layouts = LAYOUTS

    def scores(self, variables: Any) -> dict[str, np.ndarray]:
        """{kind: scores (n, ways)} of the set's images."""
        # Classes of equal prompts are scored once: a matrix product may round equal columns differently, and the rule
        # for ties would not see that they are tied.
        rows = {prompts: i for i, prompts in enumerate(dict.fromkeys(map(tuple, self.data.prompts)))}
        img = self.encoder.images(variables, self.data.images, ("z", "s"))
        txt = self.encoder.texts(variables, [text for prompts in rows for text in prompts], ("z", "s"))
        scores = class_scores(img, txt, [len(prompts) for prompts in rows], self.encoder.tau)
        classes = [rows[tuple(prompts)] for prompts in self.data.prompts]
        return {kind: s[:, classes] for kind, s in scores.items()}

    def measure(self, variables: Any) -> list[Result]:
        """Return the results that the class names."""
        labels, groups = np.asarray(self.data.labels), self.data.groups
        n, ways = len(labels), len(self.data.prompts)
        results = [self.count("n", n), self.count("ways", ways)]
        results += [self.count("n", np.sum(mask), group=group) for group, mask in groups.items()]
        for score, scores in self.scores(variables).items():
            if labels.ndim == 2:
                items = {key: PerExample(scores, other=labels, statistic=key) for key in ("map", "map11")}
                results += [self.result(k, x.value(), n=n, items=x, score=score) for k, x in items.items()]
                continue
            items = _items(scores, labels, groups)
            if self.data.card.metric == "roc_auc":
                with np.errstate(invalid="ignore"):  # of unreadable images NaN
                    items["roc_auc"] = PerExample(scores[:, 1] - scores[:, 0], other=labels == 1, statistic="roc_auc")
            if self.data.card.metric == "top1_top5":
                items["top1_top5"] = PerExample((items["top1"].values + items["top5"].values) / 2)
            parts = {group: _metrics(scores[mask], labels[mask]) for group, mask in groups.items()}
            whole = _mean(list(parts.values())) if parts else _metrics(scores, labels)
            whole |= {key: items[key].value() for key in items if key not in whole}
            chance = {f"top{k}": 100 * min(k / ways, 1) for k in (1, 5)}
            for key, value in whole.items():
                results.append(self.result(key, value, n=n, chance=chance.get(key), items=items.get(key), score=score))
            for group, metrics in parts.items():
                size = int(np.sum(groups[group]))
                for key, value in metrics.items():
                    results.append(self.result(key, value, n=size, chance=chance.get(key), score=score, group=group))
        return results


def _items(scores: np.ndarray, labels: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, PerExample]:
    """Each image's part in the set's metrics: the mean over groups counts each group alike."""
    ranks, masks = _ranks(scores, labels), list(groups.values()) or [np.ones(len(labels), bool)]
    even, classes = np.zeros(len(labels)), np.zeros(len(labels))
    for mask in masks:
        even[mask] += 1 / mask.sum()
        of_class = class_weights(labels[mask])
        classes[mask] += of_class / of_class.sum()
    return {
        "top1": PerExample((ranks < 1).astype(float), even),
        "top5": PerExample((ranks < 5).astype(float), even),
        "mean_per_class": PerExample((ranks < 1).astype(float), classes),
    }


def _metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    shares = {
        "top1": accuracy(scores, labels, 1),
        "top5": accuracy(scores, labels, 5),
        "mean_per_class": mean_per_class(scores, labels),
    }
    return {key: 100 * value for key, value in shares.items()}


def _mean(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([part[key] for part in parts])) for key in parts[0]}


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length; an all-zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one, int (n,); the largest integer without a valid ranking."""
    logits, labels = np.asarray(logits), np.asarray(labels)[:, None]
    own = np.take_along_axis(logits, labels, axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels))
    ranked = valid_rows(logits) & (own[:, 0] > -np.inf)
    return np.where(ranked, before.sum(axis=1), np.iinfo(np.int64).max)
