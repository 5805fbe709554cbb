"""Retrieval in both directions: recall at k, the share of queries with any of their matches among the k best items."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy

from xclip_jax.core import console
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import statistics
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric
from xclip_jax.evaluators.encoder import Features
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample, row_blocks
from xclip_jax.evaluators.zeroshot import compare, encode_pairs, spreads_of
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import Similarity

KS = (1, 5, 10)
# Scores of a kind that are held at once, fp32: COCO's 5,000 images and 25,000 captions are one block, and all 85,000
# pairs of a hundredth of 8.5 million would be 29 GB of each kind.
BLOCK = 1 << 27


def recall_at_k(scores: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Share of queries with any positive among the k best items; equal scores rank by item index, lowest first.

    Args:
      scores: (queries, items), higher is nearer.
      positives: bool of the same shape.
      k: from the number of items on every query counts, except those without a valid ranking: with a score that is NaN
        or plus infinity, or minus infinity for all positives.

    Raises:
      UserError: a query without positives, or shapes that differ.
    """
    return float((ranks(np.asarray(scores), np.asarray(positives)) < k).mean())


def ranks(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """How many items come before each query's best positive, int (queries,), see `statistics.ranks`."""
    if scores.shape != positives.shape or not positives.any(axis=1).all():
        raise UserError(
            f"scores {scores.shape} and positives {positives.shape} must have one shape, and each query a positive."
        )
    best = np.empty(len(scores), np.int64)
    for block in row_blocks(scores):
        part, match = scores[block], positives[block]
        highest = part.max(axis=1, keepdims=True, where=match, initial=-np.inf)
        best[block] = (match & (part == highest)).argmax(axis=1)
    return statistics.ranks(scores, best)


def ranks_by_score(
    similarities: Sequence[Similarity], img: Features, rows: Sequence[np.ndarray], captions: list[list[str]]
) -> dict[str, dict[str, np.ndarray]]:
    """`ranks` of both directions by each score of `compare`: {score: {direction: int (queries,)}}.

    The scores of a large set are computed for a block of queries at a time, in each direction, and never held whole.

    Args:
      similarities, img, rows: as `compare` takes them.
      captions: of the images; those of all, one after another, are the texts of `rows`.
    """
    matches, images, texts = Matches(captions), len(captions), len(rows[0])
    whole = compare(similarities, img, rows) if images * texts <= BLOCK else {}
    spreads = () if whole else spreads_of(similarities, img, rows, max(1, BLOCK // texts))
    ranked: dict[str, dict[str, list[np.ndarray]]] = {}
    for direction, queries, items in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        step = max(1, BLOCK // items)
        for start in range(0, queries, step):
            console.report_progress()
            part = slice(start, start + step)
            if direction == "image_to_text":
                positive = matches.of_images(part)
                scores = whole or compare(similarities, {key: x[part] for key, x in img.items()}, rows, spreads)
            else:
                positive = matches.of_captions(part)
                scores = whole or compare(similarities, img, [x[part] for x in rows], spreads)
                scores = {score: x.T for score, x in scores.items()}
            for score, x in scores.items():
                ranked.setdefault(score, {}).setdefault(direction, []).append(ranks(x, positive))
            del scores  # before the next block is computed
    return {
        score: {direction: np.concatenate(parts) for direction, parts in of_score.items()}
        for score, of_score in ranked.items()
    }


def chance(matches: np.ndarray, items: int, k: int) -> float:
    """Expected recall at k of a random ranking: the mean over queries of 1 - C(n - m, k) / C(n, k).

    Args:
      matches: how many items are right for each query, m, int (queries,).
      items: how many there are, n.
      k: items of the ranking that count.
    """
    missed = np.ones(len(matches))
    for i in range(min(k, items)):  # item i + 1 of the ranking is drawn from the n - i that are left
        missed *= np.maximum(items - matches - i, 0) / (items - i)
    return float(1 - missed.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Images and their captions.

    Attributes:
      name: in the metrics' names.
      images: `len` and `[]`, uint8 (size, size, 3).
      captions: one or more for each image; a caption that several images share matches all of them.
    """

    evaluator: ClassVar[str] = "retrieval"

    name: str
    images: Sequence[np.ndarray]
    captions: list[list[str]]
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not len(self.images) or len(self.images) != len(self.captions) or not all(self.captions):
            raise UserError(
                f"{self.name}: {len(self.images)} images and {len(self.captions)} lists of captions; give each image "
                f"one caption or more."
            )


LAYOUT = Layout(
    "retrieval, recall %",
    ("retrieval",),
    (
        Metric("image_to_text/r1", "i2t R@1", "image to text, R@1"),
        Metric("image_to_text/r5", "R@5", "image to text, R@5"),
        Metric("text_to_image/r1", "t2i R@1", "text to image, R@1"),
        Metric("text_to_image/r5", "R@5", "text to image, R@5"),
    ),
    (
        Column("images", "images", ">6"),
        Column("texts", "captions", ">8"),
        Column("i2t@1", "image_to_text/r1", ">8", chance=">7"),
        Column("i2t@5", "image_to_text/r5", ">8", chance=">7"),
        Column("t2i@1", "text_to_image/r1", ">8", chance=">7"),
        Column("t2i@5", "text_to_image/r5", ">8", chance=">7"),
    ),
)


class Retrieval(Evaluator):
    """r1, r5 and r10 in percent, named "retrieval/<set>[/<score>]/image_to_text/r1" and ".../text_to_image/r1".

    Every caption is an item and a query, repeated ones too, as Flickr30k and COCO count. Scores are those of
    `zeroshot.compare`; "retrieval/<set>/chance/image_to_text/r1" and so on are what a random ranking gives.
    """

    family = "retrieval"
    layouts = (LAYOUT,)

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class docstring lists; their items are images, or captions, grouped by image."""
        captions = self.data.captions
        texts = [caption for of_image in captions for caption in of_image]
        img, rows = encode_pairs(self.encoder, variables, self.data.images, texts)
        by_score = ranks_by_score(self.encoder.similarities, img, rows, captions)
        counts, sizes = Matches(captions).counts(), (len(texts), len(captions))
        levels = {
            f"{direction}/r{k}": 100 * chance(matches, items, k)
            for (direction, matches), items in zip(counts.items(), sizes, strict=True)
            for k in KS
        }
        of_caption = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
        groups = {"text_to_image": of_caption if len(texts) > len(captions) else None}
        results = [self.count("images", len(captions)), self.count("captions", len(texts))]
        results += [self.result(f"chance/{metric}", level) for metric, level in levels.items()]
        for score, of_score in by_score.items():
            for direction, rank in of_score.items():
                for k in KS:
                    items = PerExample((rank < k).astype(float), groups=groups.get(direction))
                    metric = f"{direction}/r{k}"
                    fields = {"n": len(rank), "chance": levels[metric], "items": items, "score": score}
                    results.append(self.result(metric, items.value(), **fields))
        return results


class Matches:
    """Which of all captions, in order, each image has: one that several images share is right for all of them."""

    def __init__(self, captions: list[list[str]]) -> None:
        """Takes the captions of each image."""
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
        self._text = np.array([numbers[text] for texts in captions for text in texts])
        image = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        shape = len(captions), len(numbers)
        self._has = scipy.sparse.csr_array((np.ones(len(image), bool), (image, self._text)), shape)

    def of_images(self, part: slice = slice(None)) -> np.ndarray:
        """bool (images of the part, captions)."""
        return self._has[part].toarray()[:, self._text]

    def of_captions(self, part: slice) -> np.ndarray:
        """bool (captions of the part, images)."""
        return self._has.T.tocsr()[self._text[part]].toarray()

    def counts(self) -> dict[str, np.ndarray]:
        """How many captions are right for each image, and how many images for each caption, by direction."""
        images = np.bincount(self._has.indices, minlength=self._has.shape[1])
        return {"image_to_text": self._has @ np.bincount(self._text), "text_to_image": images[self._text]}


def positives(captions: list[list[str]]) -> np.ndarray:
    """Which of all captions, in order, each image has: bool (images, captions)."""
    return Matches(captions).of_images()
