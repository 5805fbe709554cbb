"""Predictions of a model on images and texts for picture and page, drawn by a seed and never selected by hand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.core.errors import BadSample, UserError, describe
from xclip_jax.data import loader
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.base import SetKind
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.retrieval import Matches, RetrievalSet
from xclip_jax.evaluators.retrieval import ranks as ranks_of
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet, compare, encode_pairs
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import cluster_similarity, features, softmax

POOL = 1000  # images of a set
NUM_IMAGES = 9  # classified images of a set
NUM_QUERIES = 8  # searched texts
TOP = 6  # images in a row
SHOWN = 96  # side of an image on the page, pixels
PROMPTS = 6000  # about the most class texts of a set
ZEROSHOT_SETS = 3  # sets for classification
CLUSTERS = 24
_PROBABILITY = "probability"
_NOT_FINITE = "similarities that are not finite name and find nothing; look at the loss."
_NO_SIMILARITY = (
    "The model does not compare images with texts (no term of its objective has a similarity), so no examples of its "
    "predictions are shown."
)


class Gallery(NamedTuple):
    """Images at the model's size, the same at the page's size, and their names."""

    images: list[np.ndarray]
    shown: list[np.ndarray]
    names: list[str]


class ScoredLabel(NamedTuple):
    """A name for an image with the length of its bar (0 to 1), the text at its end, and whether it is right."""

    name: str
    value: float
    text: str
    right: bool


class Prediction(NamedTuple):
    """An image, its right name, that name's rank (from 1), and the best five names."""

    image: np.ndarray
    name: str
    rank: int
    best: list[ScoredLabel]


class ZeroShotExamples(NamedTuple):
    """Classified images of one set: its title, a sentence on names and bars, and the number of names."""

    title: str
    sentence: str
    num_classes: int
    guesses: list[Prediction]


class SearchResult(NamedTuple):
    """Results of a text query: a gallery's images, best first, and whether each is right, if known."""

    text: str
    images: list[int]
    right: list[bool]
    rank: int = 0  # first right image, from 1; 0 if unknown


class RetrievalExamples(NamedTuple):
    """Retrieval in both directions on one set with these `texts`, and the meaning of the bars."""

    title: str
    texts: Sequence[str]
    meaning: str
    gallery: Gallery
    by_text: list[SearchResult]
    by_image: list[Prediction]


class Cluster(NamedTuple):
    """A cluster: how many pictures and texts are assigned to it, and its nearest gallery images and words."""

    number: int
    pictures: int
    texts: int
    images: list[int]
    words: list[str]


class Clusters(NamedTuple):
    """The clusters with the most pictures; `used` of `k` contain a picture of the gallery."""

    k: int
    used: int
    gallery: Gallery
    most: list[Cluster]


@dataclasses.dataclass
class Examples:
    """A model's predictions in a report; `missing` contains the reasons for empty fields."""

    seed: int = 0
    named: list[ZeroShotExamples] = dataclasses.field(default_factory=list)
    gallery: Gallery = dataclasses.field(default_factory=lambda: Gallery([], [], []))
    searches: list[SearchResult] = dataclasses.field(default_factory=list)
    retrieved: RetrievalExamples | None = None
    clusters: Clusters | None = None
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
    """Return `Examples` of the first sets for classification and retrieval; all processes must call this.

    `registry.load` opens `specs` by `data`, `data_dir` and `profile`, and `seed` draws images and texts.
    """
    if not encoder.similarities:
        return Examples(seed, missing=[_NO_SIMILARITY])
    examples = Examples(seed)
    kinds: dict[type[SetKind], None] = {}
    words: list[str] = []
    prepare = encoder.preprocessing
    for spec in dict.fromkeys(specs):
        try:
            kind = registry.check(spec)
            wanted = {"classes": len(examples.named) < ZEROSHOT_SETS, "captions": examples.retrieved is None}
            if not wanted.get(kind.shows(spec)):
                continue
            own = registry.load(spec, prepare, data_dir, profile, data)
            shown = registry.load(spec, prepare.with_size(SHOWN), data_dir, profile, data)
        except (UserError, OSError) as error:
            examples.missing.append(str(error))
            continue
        if kind.shows(spec) == "captions":
            examples.retrieved = _retrieved(encoder, variables, own, shown, seed, examples.missing)
        elif np.ndim(own.labels) == 1:
            title, sentence = kind.display.panels.get(spec, (spec, "The model chooses among {num_classes} names."))
            _add_names(examples, encoder, variables, title, sentence, own, shown)
            words += own.names
        kinds[kind] = None
    examples.credits = list(dict.fromkeys(kind.display.credit for kind in kinds if kind.display.credit))
    if examples.retrieved and not examples.named:
        examples.gallery = examples.retrieved.gallery
        words = list(examples.retrieved.texts)
    if examples.gallery.images:
        queries = list(dict.fromkeys(query for kind in kinds for query in kind.display.queries))
        _search_and_cluster(examples, encoder, variables, queries, list(dict.fromkeys(words)))
    return examples


def _decode(data: ZeroShotSet | RetrievalSet, indices: np.ndarray, missing: list[str]) -> dict[int, np.ndarray]:
    """Return {index: image} for the decodable `indices`, and add a sentence on the others to `missing`."""
    images = {}
    errors = []
    for i in indices.tolist():
        try:
            images[i] = data.images[i]
        except BadSample as error:
            errors.append(describe(error))
    if errors:
        lost = f"{len(errors):,} of {len(indices):,} images drawn from {data.name} cannot be read"
        missing.append(f"{lost}; the first: {errors[0]}.")
    return images


def _add_names(
    examples: Examples,
    encoder: Encoder,
    variables: Variables,
    title: str,
    sentence: str,
    zeroshot: ZeroShotSet,
    shown: ZeroShotSet,
) -> None:
    """Add names for images of different classes; images of the first two sets are also added to the gallery."""
    rng = np.random.default_rng(examples.seed)
    order = rng.permutation(len(zeroshot.labels))
    searched = len(examples.named) < 2

    def of_classes(some: np.ndarray) -> np.ndarray:
        return some[np.sort(np.unique(np.asarray(zeroshot.labels)[some], return_index=True)[1])][:NUM_IMAGES]

    first = of_classes(order)
    # Later sets encode only their shown images.
    pool = rng.permutation(len(zeroshot.labels))[:POOL] if searched else []
    decoded = _decode(shown, np.unique([*first, *pool]).astype(int), examples.missing)
    if not decoded:
        return
    keep = list(decoded)
    first = of_classes(order[np.isin(order, keep)])  # replaces unreadable images
    each = max(1, PROMPTS // len(zeroshot.prompts))
    zeroshot = dataclasses.replace(
        zeroshot,
        images=[zeroshot.images[i] for i in keep],
        labels=np.asarray(zeroshot.labels)[keep],
        prompts=[texts[:each] for texts in zeroshot.prompts],
        groups={},
    )
    scores = ZeroShot(encoder, zeroshot).scores(variables)
    if not np.isfinite(scores[""]).all():
        examples.missing.append(f"{title}: {_NOT_FINITE}")
        return
    indices = np.searchsorted(keep, first)
    bars, meaning = _bars(encoder, variables, {score: x[indices] for score, x in scores.items()})
    ranking = np.argsort(-scores[""][indices], axis=1, kind="stable")
    guesses = []
    for row, i in enumerate(indices):
        label = int(zeroshot.labels[i])
        best = [_label(bars[row, k], meaning, zeroshot.names[k], k == label) for k in ranking[row, :5]]
        rank = int(np.flatnonzero(ranking[row] == label)[0]) + 1
        guesses.append(Prediction(decoded[keep[i]], zeroshot.names[label], rank, best))
    num_classes = len(zeroshot.prompts)
    sentence = f"{sentence.replace('{num_classes}', f'{num_classes:,}')} Bars: {meaning}."
    examples.named.append(ZeroShotExamples(title, sentence, num_classes, guesses))
    if searched:
        examples.gallery.images.extend(zeroshot.images)
        examples.gallery.shown.extend(decoded.values())
        examples.gallery.names.extend(zeroshot.names[label] for label in zeroshot.labels)


def _bars(encoder: Encoder, variables: Variables, scores: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Return lengths of bars and their meaning: probabilities, or scores if the similarity has a label for bars."""
    label = encoder.similarities[0].bar_label
    return (scores[""], label) if label else (softmax(encoder.logits_of(scores, variables)), _PROBABILITY)


def _label(value: float, meaning: str, name: str, right: bool) -> ScoredLabel:
    text = f"{value:.2f}"
    if meaning == _PROBABILITY:
        text = "<1 %" if value < 0.01 else f"{100 * value:.0f} %"
    return ScoredLabel(name, float(np.clip(value, 0, 1)), text, right)


def _retrieved(
    encoder: Encoder, variables: Variables, data: RetrievalSet, shown: RetrievalSet, seed: int, missing: list[str]
) -> RetrievalExamples | None:
    """Return results for `NUM_QUERIES` texts and `NUM_IMAGES` images; None without readable images or finite scores."""
    rng = np.random.default_rng(seed)
    decoded = _decode(shown, np.sort(rng.permutation(len(data.images))[:POOL]), missing)
    if not decoded:
        return None
    captions = [data.captions[i] for i in decoded]
    texts = [text for of_image in captions for text in of_image]
    names = [of_image[0] for of_image in captions]
    gallery = Gallery([data.images[i] for i in decoded], list(decoded.values()), names)
    by_score = compare(encoder.similarities, *encode_pairs(encoder, variables, gallery.images, texts))
    scores = by_score[""]
    if not np.isfinite(scores).all():
        missing.append(f"{data.name}: {_NOT_FINITE}")
        return None
    bars, meaning = _bars(encoder, variables, by_score)
    matches = Matches(captions).of_images()
    by_text = []
    by_image = []
    # In a NumPy array each text would take as much memory as the longest.
    places = {text: t for t, text in reversed(list(enumerate(texts)))}
    first = np.array([places[text] for text in sorted(places)])
    for t in rng.permutation(first)[:NUM_QUERIES]:
        best = np.argsort(-scores[:, t], kind="stable")[:TOP]
        rank = int(ranks_of(scores[:, t][None], matches[:, t][None])[0]) + 1
        by_text.append(SearchResult(texts[t], best.tolist(), matches[best, t].tolist(), rank))
    for i in rng.permutation(len(gallery.images))[:NUM_IMAGES]:
        once: dict[str, int] = {}  # several images may share a text
        for t in np.argsort(-scores[i], kind="stable"):
            once.setdefault(texts[t], t)
        choices = [_label(bars[i, t], meaning, text, bool(matches[i, t])) for text, t in list(once.items())[:5]]
        rank = int(ranks_of(scores[i][None], matches[i][None])[0]) + 1
        by_image.append(Prediction(gallery.shown[i], names[i], rank, choices))
    return RetrievalExamples(tables.shorten([data.name])[data.name], texts, meaning, gallery, by_text, by_image)


def _search_and_cluster(
    examples: Examples, encoder: Encoder, variables: Variables, queries: Sequence[str], words: Sequence[str]
) -> None:
    similarities = encoder.similarities
    img = encoder.images(variables, examples.gallery.images, features(similarities))
    if queries:
        txt = encoder.texts(variables, queries, features(similarities))
        scores = compare(similarities, img, [similarity.rows(txt[similarity.feature]) for similarity in similarities])
        best = np.argsort(-scores[""].T, axis=1, kind="stable")[:, :TOP]
        examples.searches = [SearchResult(text, row.tolist(), []) for text, row in zip(queries, best, strict=True)]
    similarity = cluster_similarity(similarities)
    if similarity is None:
        return
    txt = encoder.texts(variables, words, (similarity.feature,))
    p = similarity.rows(img[similarity.feature])
    q = similarity.rows(txt[similarity.feature])
    pictures = np.bincount(p.argmax(axis=1), minlength=p.shape[1])
    texts = np.bincount(q.argmax(axis=1), minlength=p.shape[1])
    used = int(np.count_nonzero(pictures))
    most = []
    for k in np.argsort(-pictures, kind="stable")[: min(CLUSTERS, used)]:
        images, nearest = (np.argsort(-x[:, k], kind="stable")[:TOP].tolist() for x in (p, q))
        most.append(Cluster(int(k), int(pictures[k]), int(texts[k]), images, [words[i] for i in nearest]))
    examples.clusters = Clusters(p.shape[1], used, examples.gallery, most)
