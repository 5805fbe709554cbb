"""Predictions of a model on images and texts, computed once for the picture and for the page.

Examples are drawn by a seed, never selected by hand.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.data.transforms import normalize
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.encoder import Encoder, Features
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.retrieval import Matches, RetrievalSet
from xclip_jax.evaluators.retrieval import ranks as ranks_of
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, compare, encode_pairs
from xclip_jax.models.two_towers import TwoTowers, Variables
from xclip_jax.objectives.similarity import Similarity, cluster_similarity, features, softmax
from xclip_jax.parallel.mesh import replicated
from xclip_jax.report.choose_examples import readable, select

POOL = 1000  # images of a set
NUM_IMAGES = 9  # images that get names, of each set
NUM_QUERIES = 8  # texts that are searched for
TOP = 6  # images in a row
CLUSTERS = 96
_PROBABILITY = "probability"
_NO_SIMILARITY = (
    "The model does not compare images with texts (no term of its objective has a similarity), so no examples of its "
    "predictions are shown."
)


class Gallery(NamedTuple):
    """Images at the model's size and at the size of the page, and their names."""

    images: list[np.ndarray]
    shown: list[np.ndarray]
    names: list[str]


class ScoredLabel(NamedTuple):
    """A name for an image: the length of its bar (0 to 1), the number at its end, and whether it is right."""

    name: str
    value: float
    text: str
    right: bool


class Prediction(NamedTuple):
    """An image, its right name, the rank of that name among all (from 1), and the best five names."""

    image: np.ndarray
    name: str
    rank: int
    best: list[ScoredLabel]


class ZeroShotExamples(NamedTuple):
    """Names for images of one set: its title, a sentence about names and bars, and the number of names."""

    title: str
    sentence: str
    num_classes: int
    guesses: list[Prediction]


class SearchResult(NamedTuple):
    """Results of a text query: indices of a gallery's images, best first, and whether each is right, if known."""

    text: str
    images: list[int]
    right: list[bool]
    rank: int = 0  # of the first right image, from 1; 0 if it is not known


class RetrievalExamples(NamedTuple):
    """Both directions of retrieval on one set: images for texts, texts for images, and the meaning of the bars."""

    title: str
    texts: int
    meaning: str
    gallery: Gallery
    by_text: list[SearchResult]
    by_image: list[Prediction]


class Cluster(NamedTuple):
    """One cluster: images (indices of the gallery) and words nearest to it, and how many have it as their first."""

    number: int
    pictures: int
    texts: int
    images: list[int]
    words: list[str]


class Clusters(NamedTuple):
    """The clusters with the most pictures; `used` of `k` have a picture of the gallery."""

    k: int
    used: int
    gallery: Gallery
    most: list[Cluster]


class Maps(NamedTuple):
    """Attention over the patches of images with `indices` in a gallery: maps (n, rows, columns), each with sum 1.

    `last` is the attention that the features are read with, and `meaning` says in words what its maps show.
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
    seed: int = 0,
    profile: Profile = PROFILES["openai"],
) -> Examples:
    """Compute all `Examples` but the attention maps. With several processes all call this, and all get the same.

    The seed draws images and texts; for the other arguments see `choose_examples.select`.
    """
    if not encoder.similarities:
        return Examples(seed, missing=[_NO_SIMILARITY])
    chosen = select(specs, encoder.preprocessing, data_dir, data, profile)
    kinds = dict.fromkeys(chosen.kinds)
    credits = list(dict.fromkeys(kind.display.credit for kind in kinds if kind.display.credit))
    examples = Examples(seed, credits=credits, missing=chosen.missing)
    words: Sequence[str] = [name for _, _, zeroshot, _ in chosen.zeroshot for name in zeroshot.names]
    for title, sentence, zeroshot, shown in chosen.zeroshot:
        # A set of which no image can be read is named; the page has the other sets.
        with _errors_to(examples.missing):
            _add_names(examples, encoder, variables, title, sentence, zeroshot, shown)
    if chosen.retrieval:
        with _errors_to(examples.missing):
            examples.retrieved, captions = _retrieved(encoder, variables, *chosen.retrieval, seed, examples.missing)
            if not examples.named:
                examples.gallery = examples.retrieved.gallery
                words = captions
    if examples.gallery.images:
        queries = list(dict.fromkeys(query for kind in kinds for query in kind.display.queries))
        _search_and_cluster(examples, encoder, variables, queries, list(dict.fromkeys(words)))
    return examples


@contextlib.contextmanager
def _errors_to(missing: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        missing.append(str(error))


def _add_names(
    examples: Examples,
    encoder: Encoder,
    variables: Variables,
    title: str,
    sentence: str,
    zeroshot: ZeroShotSet,
    shown: ZeroShotSet,
) -> None:
    """Add names for images of a set, of different classes; images of the first two sets also to the gallery."""
    rng = np.random.default_rng(examples.seed)
    order = rng.permutation(len(zeroshot.labels))
    searched = len(examples.named) < 2

    def of_classes(some: np.ndarray) -> np.ndarray:
        return some[np.sort(np.unique(np.asarray(zeroshot.labels)[some], return_index=True)[1])][:NUM_IMAGES]

    first = of_classes(order)
    # Other sets than the first two encode only the images that they show.
    pool = rng.permutation(len(zeroshot.labels))[:POOL] if searched else []
    keep = readable(shown, np.unique([*first, *pool]).astype(int), examples.missing)
    first = of_classes(order[np.isin(order, keep)])  # others of the pool if the first are unreadable
    zeroshot = _subset(zeroshot, keep)
    shown = _subset(shown, keep)
    scores = ZeroShot(encoder, zeroshot).scores(variables)
    indices = np.searchsorted(keep, first)
    bars = _bars(encoder, variables, {score: x[indices] for score, x in scores.items()})
    ranking = np.argsort(-scores[""][indices], axis=1, kind="stable")
    guesses = []
    for row, i in enumerate(indices):
        label = int(zeroshot.labels[i])
        best = [bars.label(row, k, zeroshot.names[k], k == label) for k in ranking[row, :5]]
        rank = int(np.flatnonzero(ranking[row] == label)[0]) + 1
        guesses.append(Prediction(shown.images[i], zeroshot.names[label], rank, best))
    num_classes = len(zeroshot.prompts)
    sentence = f"{sentence.replace('{num_classes}', f'{num_classes:,}')} Bars: {bars.meaning}."
    examples.named.append(ZeroShotExamples(title, sentence, num_classes, guesses))
    if searched:
        examples.gallery.images.extend(zeroshot.images)
        examples.gallery.shown.extend(shown.images)
        examples.gallery.names.extend(zeroshot.names[label] for label in zeroshot.labels)


def _subset(data: ZeroShotSet, keep: np.ndarray) -> ZeroShotSet:
    """Return the part of a set with the indices `keep`, its images decoded."""
    images = [data.images[i] for i in keep]
    return dataclasses.replace(data, images=images, labels=np.asarray(data.labels)[keep], groups={})


class _Bars(NamedTuple):
    """Bars for scores (n, m): their values from 0 to 1, and the meaning of these."""

    values: np.ndarray
    meaning: str

    def label(self, row: int, column: int, name: str, right: bool) -> ScoredLabel:
        """Return the bar of one score."""
        value = self.values[row, column]
        text = f"{value:.2f}"
        if self.meaning == _PROBABILITY:
            text = "<1 %" if value < 0.01 else f"{100 * value:.0f} %"
        return ScoredLabel(name, float(np.clip(value, 0, 1)), text, right)


def _bars(encoder: Encoder, variables: Variables, scores: Mapping[str, np.ndarray]) -> _Bars:
    """Return probabilities of the logits, or the scores themselves if the model's similarity has a label for bars."""
    label = encoder.similarities[0].bar_label
    if label:
        return _Bars(scores[""], label)
    return _Bars(softmax(encoder.logits_of(scores, variables)), _PROBABILITY)


def _retrieved(
    encoder: Encoder, variables: Variables, data: RetrievalSet, shown: RetrievalSet, seed: int, missing: list[str]
) -> tuple[RetrievalExamples, list[str]]:
    """Return results for `NUM_QUERIES` texts and `NUM_IMAGES` images, and all texts."""
    rng = np.random.default_rng(seed)
    keep = readable(shown, np.sort(rng.permutation(len(data.images))[:POOL]), missing)
    captions = [data.captions[i] for i in keep]
    texts = [text for of_image in captions for text in of_image]
    names = [of_image[0] for of_image in captions]
    gallery = Gallery([data.images[i] for i in keep], [shown.images[i] for i in keep], names)
    by_score = compare(encoder.similarities, *encode_pairs(encoder, variables, gallery.images, texts))
    scores = by_score[""]
    bars = _bars(encoder, variables, by_score)
    matches = Matches(captions).of_images()
    by_text = []
    by_image = []
    # In dicts: in an array of NumPy each text would take as much memory as the longest.
    places = {text: t for t, text in reversed(list(enumerate(texts)))}
    first = np.array([places[text] for text in sorted(places)])
    for t in rng.permutation(first)[:NUM_QUERIES]:
        best = np.argsort(-scores[:, t], kind="stable")[:TOP]
        rank = int(ranks_of(scores[:, t][None], matches[:, t][None])[0]) + 1
        by_text.append(SearchResult(texts[t], best.tolist(), matches[best, t].tolist(), rank))
    for i in rng.permutation(len(gallery.images))[:NUM_IMAGES]:
        once: dict[str, int] = {}  # a text of several images is shown once
        for t in np.argsort(-scores[i], kind="stable"):
            once.setdefault(texts[t], t)
        choices = [bars.label(i, t, text, bool(matches[i, t])) for text, t in list(once.items())[:5]]
        rank = int(ranks_of(scores[i][None], matches[i][None])[0]) + 1
        by_image.append(Prediction(gallery.shown[i], names[i], rank, choices))
    title = tables.shorten([data.name])[data.name]
    return RetrievalExamples(title, len(texts), bars.meaning, gallery, by_text, by_image), texts


def _search_and_cluster(
    examples: Examples, encoder: Encoder, variables: Variables, queries: Sequence[str], words: Sequence[str]
) -> None:
    """Add the searches for `queries` among the gallery's images, and their clusters with `words`."""
    similarities = encoder.similarities
    img = encoder.images(variables, examples.gallery.images, features(similarities))
    if queries:
        txt = encoder.texts(variables, queries, features(similarities))
        scores = compare(similarities, img, [similarity.rows(txt[similarity.feature]) for similarity in similarities])
        best = np.argsort(-scores[""].T, axis=1, kind="stable")[:, :TOP]
        examples.searches = [SearchResult(text, row.tolist(), []) for text, row in zip(queries, best, strict=True)]
    similarity = cluster_similarity(similarities)
    if similarity is not None:
        txt = encoder.texts(variables, words, (similarity.feature,))
        examples.clusters = _clusters(similarity, examples.gallery, img, txt, words)


def _clusters(similarity: Similarity, gallery: Gallery, img: Features, txt: Features, words: Sequence[str]) -> Clusters:
    """Return the clusters of the gallery's images and of `words`."""
    p = similarity.rows(img[similarity.feature])
    q = similarity.rows(txt[similarity.feature])
    pictures = np.bincount(p.argmax(axis=1), minlength=p.shape[1])
    texts = np.bincount(q.argmax(axis=1), minlength=p.shape[1])
    used = int(np.count_nonzero(pictures))
    most = []
    for k in np.argsort(-pictures, kind="stable")[: min(CLUSTERS, used)]:
        images, nearest = (np.argsort(-x[:, k], kind="stable")[:TOP].tolist() for x in (p, q))
        most.append(Cluster(int(k), int(pictures[k]), int(texts[k]), images, [words[i] for i in nearest]))
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
    """Return attention maps of `n` images, drawn by the seed; None if the tower has none.

    Args:
      model, variables: the towers and the variables of their `apply`.
      gallery: images to draw from, uint8 (size, size, 3).
      statistics: mean and deviation of pixels.
      mesh: mesh of the parameters.
    """
    if not model.img.attention:
        return None
    indices = np.random.default_rng(seed).permutation(len(gallery))[:n]
    images = np.stack([gallery[i] for i in indices])

    def maps(params: Any, images: jax.Array) -> jax.Array:
        return model.img.attention_maps(params, normalize(images, *statistics), model.dtype)

    last = jax.jit(maps, out_shardings=replicated(mesh))(variables["params"]["img"], images)
    return Maps(indices.tolist(), np.asarray(last), model.img.attention)
