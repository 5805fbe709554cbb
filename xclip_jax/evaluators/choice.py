"""Choice between texts that differ in few words: an image and several texts, or two images and their two texts.

Equal scores are wrong: Winoground (arXiv 2204.03162) defines its scores by strict inequalities, and so does the code
of SugarCrepe (arXiv 2306.14610) and ARO (arXiv 2210.01936) for one image.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.sparse.csgraph

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import zeroshot
from xclip_jax.evaluators.base import Column, Evaluator, Layout
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.models.two_towers import Variables

# Metrics of items with two images: their expected values if all scores are random and independent.
PAIRED = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}

_OF_TEXTS = (
    Column("texts", "ways"),
    Column("items", "n"),
    Column("accuracy", "accuracy", "accuracy", chance=True),
    Column("mean of parts", "macro_accuracy", "accuracy, mean of the parts", chance=True),
)
_OF_BOTH = (
    Column("items", "n"),
    Column("text", "text_score", "text score", chance=True),
    Column("image", "image_score", "image score", chance=True),
    Column("group", "group_score", "group score", chance=True),
)


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceSet:
    """Items of one image and two or more texts, or of two images and two texts.

    Attributes:
      images: `len` and `[]`, uint8 (size, size, 3).
      pictures: index of each item's images, int (n, 1) or (n, 2).
      texts: texts of each item; the first one belongs to the first image, the second to the second image if there is
        one, and all others are wrong.
      groups: bool (n,) of named parts, such as relations; "macro_accuracy" is the unweighted mean over parts.
      files: file of each item's first image, int (n,), if several images are cut from one file.
    """

    evaluator: ClassVar[str] = "choice"

    name: str
    images: Sequence[np.ndarray]
    pictures: np.ndarray
    texts: Sequence[Sequence[str]]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    card: Provenance = dataclasses.field(default_factory=Provenance)
    files: np.ndarray | None = None

    def __post_init__(self) -> None:
        paired = np.shape(self.pictures)[1:] == (2,)
        ways = {len(texts) for texts in self.texts}
        fits = ways == {2} if paired else min(ways, default=0) >= 2
        if not fits or np.shape(self.pictures) != (len(self.texts), 1 + paired):
            wrong = [i for i, texts in enumerate(self.texts) if len(texts) < 2 or (paired and len(texts) > 2)]
            first = f"; item {wrong[0]} has the texts {list(self.texts[wrong[0]])}" if wrong else ""
            raise UserError(
                f"{self.name}: {len(self.texts)} items with {np.size(self.pictures)} images{first}; an item is one "
                "image with two or more texts, or two images with two texts; correct or leave out the others."
            )

    @functools.cached_property
    def together(self) -> np.ndarray | None:
        """Number of each item's group, int (n,), if several items share an image or file, also through other items."""
        shared = self.pictures if self.files is None else self.files[:, None]
        n = len(shared)
        nodes = n + int(shared.max()) + 1
        items = np.repeat(np.arange(n), shared.shape[1])
        graph = scipy.sparse.coo_array((np.ones(shared.size), (items, n + shared.ravel())), (nodes, nodes))
        groups = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:n]
        return groups if len(set(groups)) < n else None


class Choice(Evaluator):
    """Choice of texts and images, in percent; named "choice/<set>[/<score>][/<group>]/<metric>".

    Items of one image have "accuracy", and "macro_accuracy" if there are groups: the right text scores higher than all
    others. Items of two images have "text_score": each image scores higher with its own text, "image_score": each text
    scores higher with its own image, and "group_score": both. `zeroshot.compare` names the scores; the deviations of
    its sum "both" are over the items' pairs. Further results are n and ways, the mean number of texts.
    """

    family = "choice"
    layouts = (
        Layout("choice of texts, %", _OF_TEXTS, zeroshot.SCORES),
        Layout("choice of texts and images, %", _OF_BOTH, zeroshot.SCORES),
    )

    def scores(self, variables: Variables) -> dict[str, list[np.ndarray]]:
        """Return {score: (images, texts) of each item}."""
        # Score an item's equal texts once: columns of one matrix product may differ in their last bits.
        texts = [list(dict.fromkeys(item)) for item in self.data.texts]
        similarities = self.encoder.similarities
        flat = [text for item in texts for text in item]
        img, rows = zeroshot.encode_pairs(self.encoder, variables, self.data.images, flat)
        parts = [
            ({key: x[pictures] for key, x in img.items()}, [x[end - len(item) : end] for x in rows])
            for pictures, item, end in zip(self.data.pictures, texts, np.cumsum(list(map(len, texts))), strict=True)
        ]
        spreads = []
        for i, own in enumerate(similarities[:2] if len(similarities) > 1 else ()):
            values = np.concatenate([own.scores(x[own.feature], y[i])[own.logits].ravel() for x, y in parts])
            spreads.append(float(values[np.isfinite(values)].std()) if np.isfinite(values).any() else 1.0)
        compared = [zeroshot.compare(similarities, x, y, spreads) for x, y in parts]
        columns = [[own.index(text) for text in item] for own, item in zip(texts, self.data.texts, strict=True)]
        return {
            score: [scores[score][:, places] for scores, places in zip(compared, columns, strict=True)]
            for score in compared[0]
        }

    def measure(self, variables: Variables) -> list[Result]:
        n = len(self.data.texts)
        groups = self.data.groups
        ways = np.array([len(item) for item in self.data.texts])
        results = [self.count("n", n), self.count("ways", ways.mean())]
        compared = self.scores(variables)
        same = sorted(groups.keys() & compared.keys())
        if same:
            raise UserError(f"{self.data.name}: the part {same[0]!r} has the name of a score of the model; rename it.")
        for score, scores in compared.items():
            for metric, right in _right(scores).items():
                level = np.full(n, PAIRED[metric]) if metric in PAIRED else 100 / ways
                averages: dict[str, Any] = {metric: None}  # weights of the items
                if groups and metric == "accuracy":
                    averages["macro_accuracy"] = np.sum([mask / mask.sum() for mask in groups.values()], axis=0)
                for key, weights in averages.items():
                    chance = np.average(level, weights=weights)
                    results.append(self.result(key, PerExample(right, weights), chance=chance, score=score))
                for group, mask in groups.items():
                    part = {"n": int(mask.sum()), "chance": level[mask].mean(), "score": score, "group": group}
                    results.append(self.result(metric, 100 * right[mask].mean(), **part))
        return results


def _right(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return {metric: (n,)}, 1.0 for right items, from each item's scores (images, texts); NaN is wrong."""
    if len(scores[0]) == 1:
        return {"accuracy": np.array([float(x[0, 0] > x[0, 1:].max()) for x in scores])}
    x = np.stack(scores)
    text = (x[:, 0, 0] > x[:, 0, 1]) & (x[:, 1, 1] > x[:, 1, 0])
    image = (x[:, 0, 0] > x[:, 1, 0]) & (x[:, 1, 1] > x[:, 0, 1])
    return {key: right.astype(float) for key, right in zip(PAIRED, (text, image, text & image), strict=True)}
