"""Similarities of images and texts, computed in NumPy from the outputs of one pair of heads.

A term of an objective may have a `Similarity`, which zero-shot classification, retrieval, reports and `xclip_jax.Model`
use. docs/extend.md shows one in another package.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from xclip_jax.core.errors import UserError

_TINY = float(np.finfo(np.float32).tiny)
# Elements in a block of distributions, for images and texts: 50,000 images with 32,768 clusters would take 6.6 GB. The
# distributions of images are computed again for each block of texts, so blocks of texts are larger.
_IMAGES, _TEXTS = 1 << 22, 1 << 25
_FEATURES = {"z": "embedding", "s": "cluster_logits"}


class Similarity(abc.ABC):
    """Scores of images against texts, from one output of both towers' heads."""

    name: ClassVar[str]  # unique in an objective
    output: ClassVar[str]  # output of the heads, without the tower: "z" for z_img (n, e) and z_txt (m, e)
    logits: ClassVar[str] = ""  # the score which, multiplied by `scale`, gives the logits of an image's classes
    scale: ClassVar[str | None] = None  # output of the model with the learned factor of these logits; None for 1
    is_distribution: ClassVar[bool] = False  # whether `rows` are distributions over clusters
    # Label of the first score in a report, from 0 to 1; "" to draw the probabilities of the logits instead.
    bar_label: ClassVar[str] = ""

    @property
    def feature(self) -> str:
        """Key of the output in the features of `Encoder`."""
        return _FEATURES.get(self.output, self.output)

    def rows(self, output: np.ndarray) -> np.ndarray:
        """Convert outputs of the heads (m, d) to rows (m, d) for comparison."""
        return output

    def class_row(self, rows: np.ndarray) -> np.ndarray:
        """Return the row (d,) of a class from the `rows` (prompts, d) of its prompts."""
        return rows.mean(axis=0)

    @abc.abstractmethod
    def scores(self, img: np.ndarray, txt: np.ndarray) -> dict[str, np.ndarray]:
        """Return scores of all images with all texts or classes, {score: (n, m)}; a higher score is a better match.

        Tables show the first score; a single one is called "".

        Args:
          img: outputs of the heads (n, d); their `rows` may be too large for a whole set.
          txt: rows (m, d).
        """

    def embedding(self, output: np.ndarray) -> np.ndarray:
        """Convert outputs of the heads (n, d), of images or texts, to unit vectors (n, d) for other uses."""
        return unit(self.rows(output))


@dataclasses.dataclass(frozen=True)
class CosineSimilarity(Similarity):
    """Cosine of L2-normalised embeddings z, after CLIP (arXiv 2103.00020); a class is the mean of its prompts."""

    name: ClassVar[str] = "embedding"
    output: ClassVar[str] = "z"
    scale: ClassVar[str | None] = "scale"

    def class_row(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean of the normalised prompts, normalised again."""
        return unit(unit(rows).mean(axis=0))

    def scores(self, img: np.ndarray, txt: np.ndarray) -> dict[str, np.ndarray]:
        """Return the cosines of unit vectors (n, e) and (m, e)."""
        return {"": img @ txt.T}


@dataclasses.dataclass(frozen=True)
class ClusterSimilarity(Similarity):
    """Similarity of distributions over clusters p = softmax(s / tau) [ours]; a class is the mean of its prompts."""

    name: ClassVar[str] = "clusters"
    output: ClassVar[str] = "s"
    logits: ClassVar[str] = "cross_entropy"
    is_distribution: ClassVar[bool] = True
    bar_label: ClassVar[str] = "likeness of cluster distributions, 0 to 1"

    tau: float = 1.0

    def rows(self, output: np.ndarray) -> np.ndarray:
        return softmax(output, self.tau)

    def scores(self, img: np.ndarray, txt: np.ndarray) -> dict[str, np.ndarray]:
        """Compare cluster logits of images (n, k) with distributions of texts (m, k).

        For distributions p of an image and q of a text, "cosine" is their cosine, and "cross_entropy" the negative
        symmetric cross-entropy, 1/2 sum_k (p log q + q log p), in nats. Both are fp32 (n, m), larger for good matches.
        """
        n, k = img.shape
        m = len(txt)
        scores = {key: np.empty((n, m), np.float32) for key in ("cosine", "cross_entropy")}
        rows = max(1, _IMAGES // k)
        columns = max(1, _TEXTS // k)
        for column in range(0, m, columns):
            q = txt[column : column + columns]
            length = np.linalg.norm(q, axis=1)
            log_q = _log(q)
            for row in range(0, n, rows):
                block = np.s_[row : row + rows, column : column + columns]
                p = softmax(img[row : row + rows], self.tau)
                scores["cosine"][block] = unit(p) @ q.T / length
                scores["cross_entropy"][block] = 0.5 * (p @ log_q.T + _log(p) @ q.T)
        return scores


def features(similarities: Sequence[Similarity]) -> tuple[str, ...]:
    """Return the features of `Encoder` for the similarities; `UserError` without any similarity."""
    if not similarities:
        raise UserError(
            "the model does not compare images with texts: no term of its objective has a similarity; evaluate "
            "probe/SET or finetuned/SET."
        )
    return tuple(dict.fromkeys(similarity.feature for similarity in similarities))


def cluster_similarity(similarities: Sequence[Similarity]) -> Similarity | None:
    """Return the first similarity of distributions over clusters, or None."""
    return next((similarity for similarity in similarities if similarity.is_distribution), None)


def unit(x: np.ndarray) -> np.ndarray:
    """Normalise rows to unit length, (..., d) -> (..., d); an all-zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def softmax(logits: np.ndarray, tau: float = 1.0) -> np.ndarray:
    """Return softmax(logits / tau) over the last axis, (..., k) -> fp32 (..., k)."""
    p = np.asarray(logits, np.float32) / tau
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def _log(p: np.ndarray) -> np.ndarray:
    """Return a finite log p: exp of a sharp softmax underflows to 0, and 0 log 0 must be 0."""
    x = np.maximum(p, _TINY)
    return np.log(x, out=x)
