"""How features of images are spread, and how clusters agree with kinds.

Effective rank: the exponential of the entropy of the singular values of the centred features, each over their sum
(RankMe, arXiv 2210.02885, without its centring). Clusters: each cluster gets the commonest kind among the fitted
photographs in it; the share of tested photographs whose cluster has their kind, and the normalised mutual information
of clusters and kinds. The same is computed for k-means of the pooled features, with as many clusters as the model's
head has, or `CLUSTERS`.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy.cluster.vq

from xclip_jax.evaluators.base import Column, Evaluator, Layout
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.models.two_towers import Variables

CLUSTERS, ITERATIONS = 1024, 20


@dataclasses.dataclass(frozen=True, eq=False)
class GeometrySet:
    """Photographs that name the clusters, and others for tests, uint8 images with labels int (n,)."""

    evaluator: ClassVar[str] = "studies.photographs.geometry:Geometry"

    name: str
    fitted: Sequence[np.ndarray]
    tested: Sequence[np.ndarray]
    fitted_labels: np.ndarray
    tested_labels: np.ndarray
    card: Provenance = dataclasses.field(default_factory=Provenance)


class Geometry(Evaluator):
    """Effective ranks "rank" and "embedding_rank"; "kind" and "nmi" of "clusters/" and "kmeans/"; "clusters/used"."""

    family = "geometry"
    layouts = (Layout("features", (Column("rank", "rank", "effective rank of the features"),)),)

    def measure(self, variables: Variables) -> list[Result]:
        names = ("features", *(similarity.feature for similarity in self.encoder.similarities))
        fitted, tested = (self.encoder.images(variables, x, names) for x in (self.data.fitted, self.data.tested))
        results = [self.count("rank", effective_rank(tested["features"]))]
        if "embedding" in tested:
            results.append(self.count("embedding_rank", effective_rank(tested["embedding"])))
        number = CLUSTERS
        if "cluster_logits" in tested:
            assigned = [side["cluster_logits"].argmax(axis=1) for side in (fitted, tested)]
            number = tested["cluster_logits"].shape[1]
            results += self._agreement("clusters", *assigned)
            results.append(self.count("clusters/used", len(np.unique(assigned[1]))))
        return results + self._agreement("kmeans", *kmeans(fitted["features"], tested["features"], number))

    def _agreement(self, name: str, fitted: np.ndarray, tested: np.ndarray) -> list[Result]:
        """Return how often clusters, int (n,) of both sides, name the kind, and their mutual information."""
        labels = self.data.tested_labels
        named = majority(fitted, self.data.fitted_labels)
        right = np.array([named.get(cluster, -1) for cluster in tested.tolist()]) == labels
        n = len(labels)
        return [
            self.result(f"{name}/kind", 100 * float(right.mean()), n=n),
            self.result(f"{name}/nmi", 100 * normalised_information(tested, labels), unit="x 100", n=n),
        ]


def effective_rank(features: np.ndarray) -> float:
    """Return the effective rank of features (n, d); NaN if they are not finite."""
    if not np.isfinite(features).all():
        return float("nan")
    s = np.linalg.svd(features - features.mean(axis=0), compute_uv=False).astype(np.float64)
    p = s / s.sum()
    return float(np.exp(-np.sum(p * np.log(np.maximum(p, 1e-30)))))


def kmeans(fitted: np.ndarray, tested: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the clusters of both sides, int (n,), by k-means of the fitted features of unit length, seed 0."""
    fitted, tested = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (fitted, tested))
    centers, assigned = scipy.cluster.vq.kmeans2(
        fitted, clusters, iter=ITERATIONS, minit="points", rng=0, missing="warn"
    )
    return assigned, scipy.cluster.vq.vq(tested, centers)[0]


def majority(clusters: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Return {cluster: the commonest label in it}, the lowest of equally common ones."""
    counts = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), int)
    np.add.at(counts, (clusters, labels), 1)
    return {cluster: int(counts[cluster].argmax()) for cluster in np.unique(clusters).tolist()}


def normalised_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mutual information of two labellings over the mean of their entropies, from 0 to 1."""
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a, b), 1 / len(a))

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    h_a, h_b = (entropy(joint.sum(axis=axis)) for axis in (1, 0))
    total = h_a + h_b
    return 2 * (total - entropy(joint.ravel())) / total if total else 0.0
