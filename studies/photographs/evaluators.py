"""Evaluators of the photographs: zero-shot classification with mean ranks, and the geometry of features."""

import dataclasses
from typing import ClassVar

import numpy as np
import scipy.cluster.vq
import scipy.stats

from xclip_jax.evaluators.base import Column, Evaluator, Layout
from xclip_jax.evaluators.probe import ProbeSet
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.evaluators.zeroshot import ZeroShot, ZeroShotSet
from xclip_jax.models.two_towers import Variables

CLUSTERS, ITERATIONS = 1024, 20


@dataclasses.dataclass(frozen=True, eq=False)
class RankedSet(ZeroShotSet):
    """A `ZeroShotSet` whose results have the geometric mean rank."""

    evaluator: ClassVar[str] = "studies.photographs.evaluators:Ranked"


class Ranked(ZeroShot):
    """`ZeroShot`, and "rank_gmean": the geometric mean over images of the right class's rank, from 1; less is better.

    It moves before top-1 does. An image without a valid ranking has the last rank.
    """

    layouts = (
        dataclasses.replace(
            ZeroShot.layouts[0],
            columns=(*ZeroShot.layouts[0].columns, Column("rank", "rank_gmean", "geometric mean rank", chance=True)),
        ),
    )

    def results_of_ranks(self, score: str, rank: np.ndarray) -> list[Result]:
        """Return "rank_gmean"."""
        ways = len(self.data.prompts)
        items = PerExample((np.minimum(rank, ways - 1) + 1).astype(float), statistic="gmean")
        chance = float(scipy.stats.gmean(np.arange(1, ways + 1)))
        return [self.result("rank_gmean", items, unit="rank", chance=chance, score=score)]


@dataclasses.dataclass(frozen=True, eq=False)
class GeometrySet(ProbeSet):
    """Photographs `train` that name the clusters, and `test`, with labels `tasks["kind"]`."""

    evaluator: ClassVar[str] = "studies.photographs.evaluators:Geometry"


class Geometry(Evaluator):
    """How features of images are spread, and how clusters agree with kinds.

    "rank" is `effective_rank` of the pooled features. "clusters/kind": each cluster gets the commonest kind among the
    training photographs in it; the share of tested photographs whose cluster has their kind. "kmeans/kind" is the same
    for k-means of the pooled features, with as many clusters as the model's head has, or `CLUSTERS`.
    """

    family = "geometry"
    layouts = (Layout("features", (Column("rank", "rank", "effective rank of the features"),)),)

    def measure(self, variables: Variables) -> list[Result]:
        names = ("features", *(similarity.feature for similarity in self.encoder.similarities))
        train, test = (self.encoder.images(variables, x, names) for x in (self.data.train, self.data.test))
        results = [self.count("rank", effective_rank(test["features"]))]
        clusters = CLUSTERS
        if "cluster_logits" in test:
            clusters = test["cluster_logits"].shape[1]
            results.append(self._agreement("clusters", *(x["cluster_logits"].argmax(axis=1) for x in (train, test))))
        return [*results, self._agreement("kmeans", *kmeans(train["features"], test["features"], clusters))]

    def _agreement(self, name: str, train: np.ndarray, test: np.ndarray) -> Result:
        """Return how often clusters, int (n,) of both sides, name the kind."""
        train_labels, _, labels = self.data.tasks["kind"]
        named = majority(train, train_labels)
        right = np.array([named.get(cluster, -1) for cluster in test.tolist()]) == labels
        return self.result(f"{name}/kind", 100 * float(right.mean()), n=len(labels))


def effective_rank(features: np.ndarray) -> float:
    """Return the exponential of the entropy of the singular values of the centred features (n, d), each over their sum.

    This is RankMe (arXiv 2210.02885) but for the centring. Features that are not finite have NaN.
    """
    if not np.isfinite(features).all():
        return float("nan")
    s = np.linalg.svd(features - features.mean(axis=0), compute_uv=False).astype(np.float64)
    return float(np.exp(scipy.stats.entropy(s)))


def kmeans(train: np.ndarray, test: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the clusters of both sides, int (n,), by k-means of the training features of unit length, seed 0."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    centers, assigned = scipy.cluster.vq.kmeans2(
        train, clusters, iter=ITERATIONS, minit="points", rng=0, missing="warn"
    )
    return assigned, scipy.cluster.vq.vq(test, centers)[0]


def majority(clusters: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Return {cluster: the commonest label in it}, the lowest of equally common ones."""
    (names, kinds), counts = scipy.stats.contingency.crosstab(clusters, labels)
    return dict(zip(names.tolist(), kinds[counts.argmax(axis=1)].tolist(), strict=True))
