"""Retrieval of images and texts by texts, texts by images, and texts by texts; similarity of sentences.

Recall at k is the share of queries with any of their matches among the k best items.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy

from xclip_jax.core import console
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import statistics
from xclip_jax.evaluators.base import Column, Evaluator, Layout
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, pearson, row_blocks, spearman
from xclip_jax.evaluators.zeroshot import compare, encode_pairs
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import features

__all__ = ("recall_at_k",)  # documented; all other names may change

Pair = tuple[str, str, float]  # two sentences and their similarity, rated by humans

KS = (1, 5, 10)
MOST_SCORES = 1 << 29  # images times captions, two gigabytes per score; COCO's test split has a quarter

_OF_IMAGES = (
    Column("images", "images"),
    Column("texts", "captions"),
    Column("i2t@1", "image_to_text/r1", "image to text, R@1", chance=True),
    Column("i2t@5", "image_to_text/r5", "image to text, R@5", chance=True),
    Column("t2i@1", "text_to_image/r1", "text to image, R@1", chance=True),
    Column("t2i@5", "text_to_image/r5", "text to image, R@5", chance=True),
)
_OF_TEXTS = (
    Column("texts", "texts"),
    Column("queries", "queries"),
    Column("R@1", "r1", "R@1", chance=True),
    Column("R@5", "r5", "R@5", chance=True),
)
_CORRELATIONS = (
    Column("pairs", "pairs"),
    Column("all", "spearman_all", "Spearman"),
    Column("mean", "spearman_mean", "Spearman, mean of the subsets"),
)


def recall_at_k(scores: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Return the share of queries with a positive among the k best items; equal scores rank by index, lowest first.

    `scores` are (queries, items), higher is nearer, and `positives` bool of the same shape, at least one per query.
    Queries without a valid ranking, see `statistics.ranks`, are wrong for every k.

    Example:
      >>> import numpy as np
      >>> from xclip_jax.evaluators.retrieval import recall_at_k
      >>> scores = np.array([[0.9, 0.1], [0.8, 0.2]])
      >>> recall_at_k(scores, np.eye(2, dtype=bool), k=1)
      0.5
    """
    return float((ranks(np.asarray(scores), np.asarray(positives)) < k).mean())


def ranks(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the number of items that precede each query's best positive, int (queries,); see `statistics.ranks`."""
    if scores.shape != positives.shape or not positives.any(axis=1).all():
        given = f"scores {scores.shape} and positives {positives.shape}"
        raise UserError(f"expected {given} of one shape, and a positive per query.")
    best = np.empty(len(scores), np.int64)
    for block in row_blocks(scores):
        part, match = scores[block], positives[block]
        highest = part.max(axis=1, keepdims=True, where=match, initial=-np.inf)
        best[block] = (match & (part == highest)).argmax(axis=1)
    return statistics.ranks(scores, best)


def chance(right: Any, copies: np.ndarray, k: int) -> float:
    """Return the expected recall at k of a random order of distinct items, whose copies rank together.

    A query is right if fewer than k places precede the first of its right items. If r of n items are right, the
    probability is r / n times the sum over j of w(j) / C(n - 1, j); w(j) is the number of sets of j wrong items with
    fewer than k places. Without copies it equals 1 - C(n - r, k) / C(n, k).

    Args:
      right: the right items of each query, a bool array (queries, items), dense or sparse.
      copies: places of each item, int (items,).
      k: places that count.
    """
    n = len(copies)
    k = min(k, int(copies.sum()))
    sizes = np.eye(k)[np.minimum(copies, k) - 1]  # one-hot: 1, 2, ... k or more places
    kinds, counts = np.unique(right @ sizes, axis=0, return_counts=True)  # right items of each size
    wrong = sizes.sum(axis=0) - kinds
    ways = np.zeros((len(kinds), k, k))  # sets of wrong items, by the number of items and of places
    ways[:, 0, 0] = 1
    for size in range(1, k):
        smaller = ways.copy()
        for m in range(1, (k - 1) // size + 1):
            chosen = scipy.special.comb(wrong[:, size - 1], m)
            ways[:, m:, m * size :] += chosen[:, None, None] * smaller[:, :-m, : -m * size]
    j = np.arange(min(k, n))
    recall = kinds.sum(axis=1) / n * (ways.sum(axis=2)[:, j] / scipy.special.comb(n - 1, j)).sum(axis=1)
    return min(float(np.average(recall, weights=counts)), 1.0)  # rounding


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Images and their captions.

    Attributes:
      images: `len` and `[]`, uint8 (size, size, 3).
      captions: one or more per image; a caption shared by several images matches all of them.
    """

    evaluator: ClassVar[str] = "retrieval"

    name: str
    images: Sequence[np.ndarray]
    captions: list[list[str]]
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        texts = sum(map(len, self.captions))
        if not texts:
            raise UserError(f"{self.name}: no image has a caption; check the file, or name another split.")
        if len(self.images) * texts > MOST_SCORES:
            raise UserError(
                f"{self.name}: {len(self.images):,} images and {texts:,} captions are too many to compare all of them; "
                "hold out or name fewer."
            )


class Retrieval(Evaluator):
    """r1, r5 and r10 in percent, named "retrieval/<set>[/<score>]/image_to_text/r1" and ".../text_to_image/r1".

    By the convention of Flickr30k and COCO every caption, repeated or not, is an item and a query. `zeroshot.compare`
    names the scores; "retrieval/<set>/chance/image_to_text/r1" and so on are the recalls of a random order.
    """

    family = "retrieval"
    layouts = (Layout("retrieval, recall %", _OF_IMAGES),)

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results listed in the class docstring; captions are resampled by image."""
        captions = self.data.captions
        texts = [caption for of_image in captions for caption in of_image]
        img, rows = encode_pairs(self.encoder, variables, self.data.images, texts)
        matches = Matches(captions)
        positive = matches.of_images()
        ranked = {}
        for score, x in compare(self.encoder.similarities, img, rows).items():
            console.report_progress()
            ranked[score] = {"image_to_text": ranks(x, positive), "text_to_image": ranks(x.T, positive.T)}
        levels = {f"{direction}/r{k}": 100 * level for k in KS for direction, level in matches.chance(k).items()}
        of_caption = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
        groups = {"text_to_image": of_caption if len(texts) > len(captions) else None}
        results = [self.count("images", len(captions)), self.count("captions", len(texts))]
        results += [self.result(f"chance/{metric}", level) for metric, level in levels.items()]
        for score, of_score in ranked.items():
            for direction, rank in of_score.items():
                for k in KS:
                    metric = f"{direction}/r{k}"
                    items = PerExample((rank < k).astype(float), groups=groups.get(direction))
                    results.append(self.result(metric, items, chance=levels[metric], score=score))
        return results


class Matches:
    """Matches between images and the captions of all images, in order; an image matches equal captions too."""

    def __init__(self, captions: list[list[str]]) -> None:
        """`captions` are the captions of each image."""
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
        self._text = np.array([numbers[text] for texts in captions for text in texts])
        image = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        shape = len(captions), len(numbers)
        self._has = scipy.sparse.csr_array((np.ones(len(image), bool), (image, self._text)), shape)

    def of_images(self) -> np.ndarray:
        """Return the captions that match each image, bool (images, captions)."""
        return self._has.toarray()[:, self._text]

    def chance(self, k: int) -> dict[str, float]:
        """Return `chance` by direction; equal captions are copies of one text, and images are all distinct."""
        images = self._has.T.tocsr()[self._text]
        return {
            "image_to_text": chance(self._has, np.bincount(self._text), k),
            "text_to_image": chance(images, np.ones(images.shape[1], int), k),
        }


def embeddings(encoder: Encoder, variables: Variables, texts: Sequence[str]) -> np.ndarray:
    """Return the unit vectors (n, e) of texts by the model's default similarity."""
    (feature,) = features(encoder.similarities[:1])
    return encoder.similarities[0].embedding(encoder.texts(variables, texts, (feature,))[feature])


@dataclasses.dataclass(frozen=True, eq=False)
class SimilaritySet:
    """Pairs of sentences with their similarity, rated by humans."""

    evaluator: ClassVar[str] = "similarity"

    name: str
    subsets: Mapping[str, Sequence[Pair]]  # {name: pairs}, one or more subsets of at least two pairs
    card: Provenance = dataclasses.field(default_factory=Provenance)


class SentenceSimilarity(Evaluator):
    """Correlation of cosine and gold times 100, without training; named "textual/<set>/<metric>".

    Published conventions differ by several points: "spearman_all" correlates all pairs together (SimCSE),
    "spearman_mean" is the unweighted mean over subsets, "spearman_weighted" weights subsets by their size (SentEval).
    Further results are pearson_all, pearson_mean and pairs.
    """

    family = "textual"
    layouts = (Layout("similarity of texts, Spearman x 100", _CORRELATIONS),)

    def measure(self, variables: Variables) -> list[Result]:
        subsets = self.data.subsets
        sizes = [len(part) for part in subsets.values()]
        pairs = [pair for part in subsets.values() for pair in part]
        e = embeddings(self.encoder, variables, [pair[side] for side in (0, 1) for pair in pairs])
        cosine = (e[: len(pairs)] * e[len(pairs) :]).sum(axis=1)
        gold = np.array([pair[2] for pair in pairs], np.float64)
        ends = np.cumsum(sizes)[:-1]
        parts = list(zip(np.split(cosine, ends), np.split(gold, ends), strict=True))
        by_rank = [100 * spearman(*part) for part in parts]
        results = [self.result("spearman_all", PerExample(cosine, other=gold, statistic="spearman"))]
        values: dict[str, Any] = {
            "spearman_mean": np.mean(by_rank),
            "spearman_weighted": np.average(by_rank, weights=sizes),
            "pearson_all": 100 * pearson(cosine, gold),
            "pearson_mean": np.mean([100 * pearson(*part) for part in parts]),
        }
        results += [self.result(key, value, unit="x 100", n=len(gold)) for key, value in values.items()]
        results.append(self.count("pairs", len(gold)))
        if len(parts) > 1:
            for (subset, part), value in zip(subsets.items(), by_rank, strict=True):
                results.append(self.result("spearman", value, group=subset, unit="x 100", n=len(part)))
        return results


@dataclasses.dataclass(frozen=True, eq=False)
class TextRetrievalSet:
    """Queries that mean the same as one of `texts`.

    `groups`, bool (queries,), are named parts, such as languages; recall is then their unweighted mean.
    """

    evaluator: ClassVar[str] = "text_retrieval"

    name: str
    texts: Sequence[str]  # items of the retrieval, all distinct
    queries: Sequence[tuple[str, int]]  # (query, index of its text)
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    card: Provenance = dataclasses.field(default_factory=Provenance)
    together: np.ndarray | None = None  # int (queries,), equal for dependent queries, such as all for one text


class TextRetrieval(Evaluator):
    """Recall of the query's text by cosine, in percent: "textual/<set>[/<group>]/r1", r5 and r10."""

    family = "textual"
    layouts = (Layout("texts by texts, recall %", _OF_TEXTS),)

    def measure(self, variables: Variables) -> list[Result]:
        n = len(self.data.texts)
        queries = self.data.queries
        groups = self.data.groups
        e = embeddings(self.encoder, variables, [*self.data.texts, *(text for text, _ in queries)])
        rank = statistics.ranks(e[n:] @ e[:n].T, np.array([target for _, target in queries]))
        weights = sum(mask / mask.sum() for mask in groups.values()) if groups else np.ones(len(queries))
        chance = {k: 100 * min(k / n, 1) for k in KS}
        results = []
        for k in KS:
            results.append(self.result(f"r{k}", PerExample((rank < k).astype(float), weights), chance=chance[k]))
        for group, mask in groups.items():
            for k in KS:
                value = 100 * float((rank[mask] < k).mean())
                results.append(self.result(f"r{k}", value, n=int(mask.sum()), chance=chance[k], group=group))
        return [*results, self.count("queries", len(queries)), self.count("texts", n)]
