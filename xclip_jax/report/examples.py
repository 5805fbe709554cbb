"""Predictions of a model on images and texts, computed once for the picture and for the page.

Examples are drawn by a seed, never selected by hand.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xclip_jax.data import loader
from xclip_jax.data.transforms import normalize
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.encoder import Encoder, Features
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.retrieval import RetrievalSet, positives
from xclip_jax.evaluators.retrieval import ranks as ranks_of
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, compare, encode_pairs
from xclip_jax.models.two_towers import TwoTowers, Variables
from xclip_jax.objectives.similarity import Similarity, cluster_similarity, features, softmax
from xclip_jax.parallel.mesh import replicated
from xclip_jax.report.selection import POOL, of_different_classes, readable, select, subset

NUM_IMAGES = 9  # images that get names, of each set
NUM_QUERIES = 8  # texts that are searched for
TOP = 6  # images in a row
CLUSTERS = 96
CLASSES = 100  # of the confusion matrix
_NO_SIMILARITY = (
    "the model does not compare images with texts (no term of its objective has a similarity), so no examples of its "
    "predictions are shown."
)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images at the model's size and at the size of the page, and their names."""

    images: list[np.ndarray]
    shown: list[np.ndarray]
    names: list[str]

    def names_of(self, indices: Sequence[int]) -> str:
        """Return the names of some images in one text."""
        return " ".join(self.names[i] for i in indices)


@dataclasses.dataclass(frozen=True)
class ScoredLabel:
    """A name for an image: the length of its bar (0 to 1), the number at its end, and whether it is right."""

    name: str
    value: float
    text: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An image, its right name, the rank of that name among all (from 1), and the best five names."""

    image: np.ndarray
    name: str
    rank: int
    best: list[ScoredLabel]


@dataclasses.dataclass(frozen=True)
class ZeroShotExamples:
    """Names for images of one set: its title, a sentence about names and bars, and the number of names."""

    title: str
    sentence: str
    num_classes: int
    guesses: list[Prediction]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Results of a text query: indices of a gallery's images, best first, and whether each is right, if known."""

    text: str
    images: list[int]
    right: list[bool]
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class RetrievalExamples:
    """Both directions of retrieval on one set: images for texts, texts for images, and the meaning of the bars."""

    title: str
    texts: int
    meaning: str
    gallery: Gallery
    by_text: list[SearchResult]
    by_image: list[Prediction]


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """A class that is predicted as another one: how often, and images of it."""

    name: str
    taken_for: str
    count: int
    images: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Confusion matrix: counts (c, c), rows the right classes, columns the predictions; empty for many classes."""

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
    """The clusters with the most pictures; `used` of `k` have a picture of the gallery."""

    k: int
    used: int
    gallery: Gallery
    most: list[Cluster]


@dataclasses.dataclass(frozen=True)
class Maps:
    """Attention over the patches of images with `indices` in a gallery: maps (n, rows, columns), each with sum 1.

    `last` is the last attention before the features, `meaning` says of what.
    """

    indices: list[int]
    last: np.ndarray
    meaning: str


@dataclasses.dataclass
class Examples:
    """Everything that a report shows of a model; `missing` says why other fields are empty."""

    seed: int = 0
    named: list[ZeroShotExamples] = dataclasses.field(default_factory=list)
    gallery: Gallery = dataclasses.field(default_factory=lambda: Gallery([], [], []))
    searches: list[SearchResult] = dataclasses.field(default_factory=list)
    retrieved: RetrievalExamples | None = None
    confusion: Confusion | None = None
    clusters: Clusters | None = None
    maps: Maps | None = None
    credits: list[str] = dataclasses.field(default_factory=list)  # who made the images
    missing: list[str] = dataclasses.field(default_factory=list)


def collect_examples(
    encoder: Encoder,
    variables: Variables,
    specs: Sequence[str],
    *,
    data: loader.DataConfig | None = None,
    data_dir: str | None = None,
    data_seed: int = 0,
    pairs: bool = True,
    seed: int = 0,
    profile: Profile = PROFILES["openai"],
) -> Examples:
    """Compute all `Examples` but the attention maps. With several processes all call this, and all get the same.

    Args:
      encoder: of the model.
      variables: arguments of `TwoTowers.apply`.
      specs: evaluation sets of the run; `select` chooses some.
      data: of the training pairs, which serve where none of the sets can be read.
      data_dir: root of TFDS data sets, None (or "") for the root in `data`.
      data_seed: of the run, which seeds `data.subset` and `data.caption_noise` of the training pairs.
      pairs: whether `data` are pairs and not labelled items.
      seed: decides which images and texts are shown.
      profile: templates and class names of the sets.
    """
    if not encoder.similarities:
        return Examples(seed, missing=[_NO_SIMILARITY])
    selection = select(specs, encoder.preprocessing, data_dir, data, seed, profile, data_seed, pairs)
    examples = Examples(seed, credits=selection.credits, missing=selection.missing)
    words: Sequence[str] = [name for _, _, zeroshot, _ in selection.zeroshot for name in zeroshot.names]
    for n, (title, sentence, zeroshot, shown) in enumerate(selection.zeroshot):
        rng = np.random.default_rng(seed)
        first = of_different_classes(zeroshot.labels, NUM_IMAGES, rng)
        # The first two sets are searched, clustered and counted; others encode only the images that they show.
        pool = rng.permutation(len(zeroshot.labels))[:POOL] if n < 2 else []
        keep = readable(shown, np.unique([*first, *pool]).astype(int), examples.missing)
        first = first[np.isin(first, keep)]
        zeroshot, shown = subset(zeroshot, keep), subset(shown, keep)
        scores = ZeroShot(encoder, zeroshot).scores(variables)
        indices = np.searchsorted(keep, first)
        bars = _bars(encoder, variables, {score: x[indices] for score, x in scores.items()})
        guesses = _named(zeroshot, shown, indices, scores[""][indices], bars)
        num_classes = len(zeroshot.prompts)
        sentence = f"{sentence.replace('{num_classes}', f'{num_classes:,}')} Bars: {bars.meaning}."
        examples.named.append(ZeroShotExamples(title, sentence, num_classes, guesses))
        if n == 0:
            examples.confusion = _confusion(title, zeroshot, shown, scores[""], rng)
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
        _search_and_cluster(examples, encoder, variables, selection.queries, list(dict.fromkeys(words)))
    return examples


def _search_and_cluster(
    examples: Examples, encoder: Encoder, variables: Variables, queries: Sequence[str], words: Sequence[str]
) -> None:
    """Add the searches for `queries` among the gallery's images, and their clusters with `words`."""
    img = encoder.images(variables, examples.gallery.images, features(encoder.similarities))
    if queries:
        examples.searches = _searches(encoder, variables, img, queries)
    if (similarity := cluster_similarity(encoder.similarities)) is not None:
        txt = encoder.texts(variables, words, (similarity.feature,))
        examples.clusters = _clusters(similarity, examples.gallery, img, txt, words)


@dataclasses.dataclass(frozen=True)
class _Bars:
    """Bars for scores (n, m): values from 0 to 1, a function that formats one, and the meaning of the values."""

    values: np.ndarray
    write: Callable[[float], str]
    meaning: str

    def label(self, row: int, column: int, name: str, right: bool) -> ScoredLabel:
        """Return the bar of one score."""
        value = self.values[row, column]
        return ScoredLabel(name, float(np.clip(value, 0, 1)), self.write(value), right)


def _bars(encoder: Encoder, variables: Variables, scores: Mapping[str, np.ndarray]) -> _Bars:
    """Return probabilities of the logits, or the scores themselves if the model's similarity has a label for bars."""
    if label := encoder.similarities[0].bar_label:
        return _Bars(scores[""], lambda value: f"{value:.2f}", label)
    probabilities = softmax(encoder.logits_of(scores, variables))
    return _Bars(probabilities, lambda value: "<1 %" if value < 0.01 else f"{100 * value:.0f} %", "probability")


def _named(
    data: ZeroShotSet, shown: ZeroShotSet, indices: np.ndarray, scores: np.ndarray, bars: _Bars
) -> list[Prediction]:
    """Return the images at `indices` with their best names; `scores` (n, classes) and `bars` have a row for each."""
    ranking = np.argsort(-scores, axis=1, kind="stable")
    guesses = []
    for row, i in enumerate(indices):
        label = int(data.labels[i])
        best = [bars.label(row, k, data.names[k], k == label) for k in ranking[row, :5]]
        rank = int(np.flatnonzero(ranking[row] == label)[0]) + 1
        guesses.append(Prediction(shown.images[i], data.names[label], rank, best))
    return guesses


def _searches(encoder: Encoder, variables: Variables, img: Features, queries: Sequence[str]) -> list[SearchResult]:
    similarities = encoder.similarities
    txt = encoder.texts(variables, queries, features(similarities))
    scores = compare(similarities, img, [similarity.rows(txt[similarity.feature]) for similarity in similarities])
    best = np.argsort(-scores[""].T, axis=1, kind="stable")[:, :TOP]
    return [SearchResult(query, row.tolist(), []) for query, row in zip(queries, best, strict=True)]


def _retrieved(
    encoder: Encoder,
    variables: Variables,
    data: RetrievalSet,
    shown: RetrievalSet,
    rng: np.random.Generator,
    missing: list[str],
) -> tuple[RetrievalExamples, list[str]]:
    """Return results for `NUM_QUERIES` texts and `NUM_IMAGES` images, and all texts."""
    keep = readable(shown, np.sort(rng.permutation(len(data.images))[:POOL]), missing)
    captions = [data.captions[i] for i in keep]
    texts = [text for of_image in captions for text in of_image]
    gallery = Gallery(
        [data.images[i] for i in keep], [shown.images[i] for i in keep], [of_image[0] for of_image in captions]
    )
    by_score = compare(encoder.similarities, *encode_pairs(encoder, variables, gallery.images, texts))
    scores, bars = by_score[""], _bars(encoder, variables, by_score)
    matches = positives(captions)
    by_text, by_image = [], []
    _, first = np.unique(texts, return_index=True)
    for t in rng.permutation(first)[:NUM_QUERIES]:
        best = np.argsort(-scores[:, t], kind="stable")[:TOP]
        rank = int(ranks_of(scores[:, t][None], matches[:, t][None])[0]) + 1
        by_text.append(SearchResult(texts[t], best.tolist(), matches[best, t].tolist(), rank))
    for i in rng.permutation(len(gallery.images))[:NUM_IMAGES]:
        order = np.argsort(-scores[i], kind="stable")
        _, once = np.unique([texts[t] for t in order], return_index=True)  # a text of several images is shown once
        choices = [bars.label(i, t, texts[t], bool(matches[i, t])) for t in order[np.sort(once)][:5]]
        rank = int(ranks_of(scores[i][None], matches[i][None])[0]) + 1
        by_image.append(Prediction(gallery.shown[i], captions[i][0], rank, choices))
    title = tables.shorten([data.name])[data.name]
    return RetrievalExamples(title, len(texts), bars.meaning, gallery, by_text, by_image), texts


def _confusion(
    title: str, data: ZeroShotSet, shown: ZeroShotSet, scores: np.ndarray, rng: np.random.Generator
) -> Confusion:
    answers, labels = scores.argmax(axis=1), np.asarray(data.labels)
    names = list(data.coarse or (data.names if len(data.names) <= CLASSES else ()))
    classes = sorted(set(names))
    counts = np.zeros((len(classes), len(classes)), int)
    if classes:
        number = {name: i for i, name in enumerate(classes)}
        numbers = np.array([number[name] for name in names])
        np.add.at(counts, (numbers[labels], numbers[answers]), 1)
        used = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
        classes, counts = [classes[i] for i in used], counts[used][:, used]
    wrong: dict[tuple[int, int], list[int]] = {}
    for i in rng.permutation(np.flatnonzero(answers != labels)):  # the seed decides among those equally frequent
        wrong.setdefault((int(labels[i]), int(answers[i])), []).append(int(i))
    most = sorted(wrong.items(), key=lambda pair: -len(pair[1]))[:12]
    mistakes = [
        ConfusedPair(data.names[a], data.names[b], len(indices), [shown.images[i] for i in indices[:3]])
        for (a, b), indices in most
    ]
    return Confusion(title, len(labels), classes, counts, mistakes)


def _clusters(similarity: Similarity, gallery: Gallery, img: Features, txt: Features, words: Sequence[str]) -> Clusters:
    """Return the clusters of the gallery's images and of `words`."""
    p, q = (similarity.rows(x[similarity.feature]) for x in (img, txt))
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


def attention(
    model: TwoTowers,
    variables: Variables,
    gallery: Sequence[np.ndarray],
    statistics: tuple[tuple[float, ...], ...],
    mesh: jax.sharding.Mesh,
    *,
    n: int = NUM_IMAGES,
    seed: int = 0,
) -> Maps | None:
    """Return maps of `n` images of `gallery`, uint8 (size, size, 3), drawn by the seed; None where the tower has none.

    Args:
      model, variables: the towers and the variables of their `apply`.
      gallery: images to draw from, one or more.
      statistics: mean and deviation of pixels.
      mesh: where the parameters are.
      n, seed: how many images, and which.
    """
    if not model.img.attention:
        return None
    indices = np.random.default_rng(seed).permutation(len(gallery))[:n]
    images = np.stack([gallery[i] for i in indices])

    def maps(params: Any, images: jax.Array) -> jax.Array:
        return model.img.attention_maps(params, normalize(images, *statistics), model.dtype)

    last = jax.jit(maps, out_shardings=replicated(mesh))(variables["params"]["img"], images)
    return Maps(indices.tolist(), np.asarray(last), model.img.attention)
