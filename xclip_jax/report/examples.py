"""Predictions of a model on images and texts, computed once for the picture and for the page.

Examples are drawn by a seed, never picked by hand.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xclip_jax.data import loader
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.retrieval import RetrievalSet, positives
from xclip_jax.evaluators.retrieval import ranks as ranks_of
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, distributions, similarities
from xclip_jax.report.selection import POOL, ZeroShotPanel, readable, select, subset

NUM_IMAGES = 9  # images that get names, of each set
NUM_QUERIES = 8  # texts that are searched for
TOP = 6  # images in a row
CLUSTERS = 96
CLASSES = 100  # of the confusion matrix


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images as the model sees them and as people see them, and their names."""

    images: list[np.ndarray]
    shown: list[np.ndarray]
    names: list[str]


@dataclasses.dataclass(frozen=True)
class ScoredLabel:
    """A name for an image: what its bar shows (0 to 1), how that is written, and whether it is right."""

    name: str
    value: float
    text: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An image, its right name, the place of that name among all (from 1), and the best five names."""

    image: np.ndarray
    name: str
    rank: int
    best: list[ScoredLabel]


@dataclasses.dataclass(frozen=True)
class ZeroShotExamples:
    """Names for images of one set: what it is, among how many names, and what bars mean."""

    title: str
    sentence: str
    ways: int
    guesses: list[Prediction]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a text finds: indices of a gallery's images, best first, and which of them are right where that is known."""

    text: str
    images: list[int]
    right: list[bool]
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class RetrievalExamples:
    """Both ways of retrieval on one set: texts that find images, images that find texts, and what their bars mean."""

    title: str
    texts: int
    meaning: str
    gallery: Gallery
    by_text: list[SearchResult]
    by_image: list[Prediction]


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """A class that is taken for another one: how often, and images of it."""

    name: str
    taken_for: str
    count: int
    images: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Who is taken for whom: counts (c, c), rows the right classes, columns the answers; empty for many classes."""

    title: str
    images: int
    classes: list[str]
    counts: np.ndarray
    mistakes: list[ConfusedPair]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One cluster: images (indices of the gallery) and words nearest to it, and how many have it as their first."""

    number: int
    pictures: int
    texts: int
    images: list[int]
    words: list[str]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The most used clusters, by pictures; `used` of `k` hold a picture of the gallery."""

    k: int
    used: int
    gallery: Gallery
    most: list[Cluster]


@dataclasses.dataclass
class Examples:
    """All that is shown of a model; empty where there is nothing, and then `missing` says for each section why."""

    seed: int = 0
    named: list[ZeroShotExamples] = dataclasses.field(default_factory=list)
    gallery: Gallery = dataclasses.field(default_factory=lambda: Gallery([], [], []))
    searches: list[SearchResult] = dataclasses.field(default_factory=list)
    retrieved: RetrievalExamples | None = None
    confusion: Confusion | None = None
    clusters: Clusters | None = None
    credits: list[str] = dataclasses.field(default_factory=list)  # who made the images
    missing: list[str] = dataclasses.field(default_factory=list)


def collect_examples(
    encoder: Encoder,
    variables: Any,
    specs: Sequence[str],
    *,
    data: loader.DataConfig | None = None,
    data_dir: str | None = None,
    queries: Sequence[str] = (),
    seed: int = 0,
) -> Examples:
    """Everything of `Examples`. With several processes all of them call this, and all get the same.

    Args:
      encoder: of the model.
      variables: what `TwoTowers.apply` takes.
      specs: evaluation sets of the run, of which `select` chooses some.
      data: of the training pairs, which serve where none of the sets can be read.
      data_dir: root of TFDS data sets, None for the default.
      queries: texts to search the images of a set that has queries with, in place of its own.
      seed: decides which images and texts are shown.
    """
    selection = select(specs, encoder.preprocessing, data_dir, data, seed)
    examples = Examples(seed, credits=selection.credits, missing=selection.missing)
    words: Sequence[str] = [name for _, zeroshot, _ in selection.zeroshot for name in zeroshot.names]
    for n, (panel, zeroshot, shown) in enumerate(selection.zeroshot):
        rng = np.random.default_rng(seed)
        first = _different(zeroshot.labels, rng)
        # The first two sets are searched, clustered and counted; of the others only what is shown is encoded.
        pool = rng.permutation(len(zeroshot.labels))[:POOL] if n < 2 else []
        keep = readable(shown, np.unique([*first, *pool]).astype(int), examples.missing)
        first = first[np.isin(first, keep)]
        zeroshot, shown = subset(zeroshot, keep), subset(shown, keep)
        scores = ZeroShot(encoder, zeroshot).scores(variables)[""]
        examples.named.append(_named(panel, zeroshot, shown, scores, np.searchsorted(keep, first), variables))
        if n == 0:
            examples.confusion = _confusion(panel.title, zeroshot, shown, scores, rng)
        if n < 2:
            examples.gallery.images.extend(zeroshot.images)
            examples.gallery.shown.extend(shown.images)
            examples.gallery.names.extend(zeroshot.names[label] for label in zeroshot.labels)
    if selection.retrieval:
        rng = np.random.default_rng(seed)
        examples.retrieved, captions = _retrieved(encoder, variables, *selection.retrieval, rng, examples.missing)
        if not selection.zeroshot:
            examples.gallery, words = examples.retrieved.gallery, captions
    if examples.gallery.images:
        img = encoder.images(variables, examples.gallery.images, ("z", "s"))
        if selection.queries:
            examples.searches = _searches(encoder, variables, img, queries or selection.queries)
        if "s" in img:
            examples.clusters = _clusters(encoder, variables, examples.gallery, img["s"], list(dict.fromkeys(words)))
    return examples


def _different(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of `NUM_IMAGES` images of different classes."""
    order = rng.permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    return order[np.sort(first)][:NUM_IMAGES]


def _named(
    panel: ZeroShotPanel, data: ZeroShotSet, shown: ZeroShotSet, scores: np.ndarray, places: np.ndarray, variables: Any
) -> ZeroShotExamples:
    values, show, meaning = _values(scores[places], variables)
    best = np.argsort(-scores[places], axis=1, kind="stable")
    guesses = []
    for row, i in enumerate(places):
        label = int(data.labels[i])
        choices = [
            ScoredLabel(data.names[k], float(np.clip(values[row, k], 0, 1)), show(values[row, k]), k == label)
            for k in best[row, :5]
        ]
        rank = int(np.flatnonzero(best[row] == label)[0]) + 1
        guesses.append(Prediction(shown.images[i], data.names[label], rank, choices))
    ways = len(data.prompts)
    return ZeroShotExamples(panel.title, f"{panel.sentence.format(ways=f'{ways:,}')} Bars: {meaning}.", ways, guesses)


def _values(scores: np.ndarray, variables: Any) -> tuple[np.ndarray, Callable[[float], str], str]:
    """What bars show, how it is written and called: probabilities, or without a learned scale the scores themselves."""
    if "log_scale" not in variables["params"]:
        return scores, lambda value: f"{value:.2f}", "likeness of cluster distributions, 0 to 1"
    scale = math.exp(variables["params"]["log_scale"])
    return distributions(scale * scores), _percent, "probability"


def _percent(value: float) -> str:
    return "<1 %" if value < 0.01 else f"{100 * value:.0f} %"


def _searches(
    encoder: Encoder, variables: Any, img: dict[str, np.ndarray], queries: Sequence[str]
) -> list[SearchResult]:
    txt = encoder.texts(variables, queries, ("z", "s"))
    q = distributions(txt["s"], encoder.tau) if "s" in txt else None
    scores = similarities(img, txt.get("z"), q, encoder.tau)[""].T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return [SearchResult(query, row.tolist(), []) for query, row in zip(queries, best, strict=True)]


def _retrieved(
    encoder: Encoder,
    variables: Any,
    data: RetrievalSet,
    shown: RetrievalSet,
    rng: np.random.Generator,
    missing: list[str],
) -> tuple[RetrievalExamples, list[str]]:
    """`NUM_QUERIES` texts and `NUM_IMAGES` images, with what each finds; and all texts."""
    keep = readable(shown, np.sort(rng.permutation(len(data.images))[:POOL]), missing)
    captions = [data.captions[i] for i in keep]
    texts = [text for of_image in captions for text in of_image]
    gallery = Gallery(
        [data.images[i] for i in keep], [shown.images[i] for i in keep], [of_image[0] for of_image in captions]
    )
    img = encoder.images(variables, gallery.images, ("z", "s"))
    txt = encoder.texts(variables, texts, ("z", "s"))
    q = distributions(txt["s"], encoder.tau) if "s" in txt else None
    scores = similarities(img, txt.get("z"), q, encoder.tau)[""]
    matches = positives(captions)
    values, show, meaning = _values(scores, variables)
    by_text, by_image = [], []
    _, first = np.unique(texts, return_index=True)
    for t in rng.permutation(first)[:NUM_QUERIES]:
        best = np.argsort(-scores[:, t], kind="stable")[:TOP]
        rank = int(ranks_of(scores[:, t][None], matches[:, t][None])[0]) + 1
        by_text.append(SearchResult(texts[t], best.tolist(), matches[best, t].tolist(), rank))
    for i in rng.permutation(len(gallery.images))[:NUM_IMAGES]:
        order = np.argsort(-scores[i], kind="stable")
        _, once = np.unique([texts[t] for t in order], return_index=True)  # a text of several images is shown once
        choices = [
            ScoredLabel(texts[t], float(np.clip(values[i, t], 0, 1)), show(values[i, t]), bool(matches[i, t]))
            for t in order[np.sort(once)][:5]
        ]
        rank = int(ranks_of(scores[i][None], matches[i][None])[0]) + 1
        by_image.append(Prediction(gallery.shown[i], captions[i][0], rank, choices))
    return RetrievalExamples(data.name, len(texts), meaning, gallery, by_text, by_image), texts


def _confusion(
    title: str, data: ZeroShotSet, shown: ZeroShotSet, scores: np.ndarray, rng: np.random.Generator
) -> Confusion:
    answers, labels = scores.argmax(axis=1), np.asarray(data.labels)
    names = list(data.coarse or (data.names if len(data.names) <= CLASSES else ()))
    classes = sorted(set(names))
    counts = np.zeros((len(classes), len(classes)), int)
    if classes:
        number = {name: i for i, name in enumerate(classes)}
        of = np.array([number[name] for name in names])
        np.add.at(counts, (of[labels], of[answers]), 1)
        seen = counts.any(axis=0) | counts.any(axis=1)
        classes, counts = [c for c, keep in zip(classes, seen, strict=True) if keep], counts[seen][:, seen]
    wrong: dict[tuple[int, int], list[int]] = {}
    for i in rng.permutation(np.flatnonzero(answers != labels)):  # the seed decides among those equally frequent
        wrong.setdefault((int(labels[i]), int(answers[i])), []).append(int(i))
    most = sorted(wrong.items(), key=lambda pair: -len(pair[1]))[:12]
    mistakes = [
        ConfusedPair(data.names[a], data.names[b], len(indices), [shown.images[i] for i in indices[:3]])
        for (a, b), indices in most
    ]
    return Confusion(title, len(labels), classes, counts, mistakes)


def _clusters(encoder: Encoder, variables: Any, gallery: Gallery, s_img: np.ndarray, words: Sequence[str]) -> Clusters:
    p = distributions(s_img, encoder.tau)
    q = distributions(encoder.texts(variables, words, ("s",))["s"], encoder.tau)
    pictures, texts = (np.bincount(x.argmax(axis=1), minlength=p.shape[1]) for x in (p, q))
    used = int(np.count_nonzero(pictures))
    most = [
        Cluster(
            int(k),
            int(pictures[k]),
            int(texts[k]),
            np.argsort(-p[:, k], kind="stable")[:TOP].tolist(),
            [words[i] for i in np.argsort(-q[:, k], kind="stable")[:TOP]],
        )
        for k in np.argsort(-pictures, kind="stable")[: min(CLUSTERS, used)]
    ]
    return Clusters(p.shape[1], used, gallery, most)
