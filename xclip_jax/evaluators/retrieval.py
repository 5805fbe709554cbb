"""Retrieval in both directions: recall at k, the share of queries with any of their matches among the k best items."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from xclip_jax.errors import UserError
from xclip_jax.evaluators import statistics
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric
from xclip_jax.evaluators.provenance import Provenance
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.statistics import PerExample, row_blocks
from xclip_jax.evaluators.zeroshot import text_scores
from xclip_jax.models.two_towers import Variables

KS = (1, 5, 10)


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


def chance(positives: np.ndarray, k: int) -> float:
    """Expected recall at k of a random ranking: the mean over queries of 1 - C(n - m, k) / C(n, k).

    Args:
      positives: bool (queries, n items); m of a query's items are positive.
      k: items of the ranking that count.
    """
    n, m = positives.shape[1], positives.sum(axis=1)
    missed = np.ones(len(m))
    for i in range(min(k, n)):  # item i + 1 of the ranking is drawn from the n - i that are left
        missed *= np.maximum(n - m - i, 0) / (n - i)
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


_LABELS = {"image_to_text": "image to text", "text_to_image": "text to image"}
LAYOUT = Layout(
    "retrieval, recall %",
    ("retrieval",),
    tuple(
        Metric(f"{direction}/r{k}", f"r{k}", f"{label}, R@{k}") for direction, label in _LABELS.items() for k in (1, 5)
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
        """Return the results that the class docstring lists; their items are images, or captions."""
        texts = [caption for captions in self.data.captions for caption in captions]
        by_score = text_scores(self.encoder, variables, self.data.images, texts)
        matches = positives(self.data.captions)
        levels = {
            f"{direction}/r{k}": 100 * chance(positive, k)
            for direction, positive in (("image_to_text", matches), ("text_to_image", matches.T))
            for k in KS
        }
        results = [self.count("images", len(self.data.images)), self.count("captions", len(texts))]
        results += [self.result(f"chance/{metric}", level) for metric, level in levels.items()]
        for score, scores in by_score.items():
            rank_of = {"image_to_text": ranks(scores, matches), "text_to_image": ranks(scores.T, matches.T)}
            for direction, rank in rank_of.items():
                for k in KS:
                    metric, items = f"{direction}/r{k}", PerExample((rank < k).astype(float))
                    fields = {"n": len(rank), "chance": levels[metric], "items": items, "score": score}
                    results.append(self.result(metric, items.value(), **fields))
        return results


def positives(captions: list[list[str]]) -> np.ndarray:
    """Which of all captions, in order, each image has: bool (images, captions)."""
    column = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    has = np.zeros((len(captions), len(column)), bool)
    for image, texts in enumerate(captions):
        has[image, [column[text] for text in texts]] = True
    return has[:, [column[text] for texts in captions for text in texts]]
