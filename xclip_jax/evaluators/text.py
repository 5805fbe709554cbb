"""Textual representation: similarity of sentences, retrieval of texts by texts. Probes of texts are `probe.Probe`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xclip_jax.errors import UserError
from xclip_jax.evaluators.encoder import Encoder, Features
from xclip_jax.evaluators.provenance import Card
from xclip_jax.evaluators.retrieval import KS, ranks
from xclip_jax.evaluators.statistics import Items, pearson, spearman
from xclip_jax.evaluators.zeroshot import distributions

Pair = tuple[str, str, float]


def embedding(features: Features, tau: float) -> np.ndarray:
    """Unit vectors (n, e) by which texts are compared: embeddings, without projection distributions over clusters."""
    x = features["z"] if "z" in features else distributions(features["s"], tau)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True, eq=False)
class SimilaritySet:
    """Pairs of sentences and how alike people found them.

    Attributes:
      name: in the metrics' names.
      subsets: name -> (sentence, sentence, gold), at least two; one for sets that have no parts.
    """

    name: str
    subsets: Mapping[str, Sequence[Pair]]
    card: Card = dataclasses.field(default_factory=Card)

    def __post_init__(self) -> None:
        for subset, pairs in self.subsets.items():
            if len(pairs) < 2:
                raise UserError(f"{self.name}: subset {subset!r} has {len(pairs)} pairs; a correlation needs two.")
        if not self.subsets:
            raise UserError(f"{self.name}: the set has no pairs.")


class Similarity:
    """Correlation of cosine and gold, times 100, without training; named "textual/<set>/<metric>".

    Two conventions that differ by several points, side by side: "spearman_all" is Spearman's over all pairs in one list
    (SimCSE's), "spearman_mean" the unweighted mean over subsets, "spearman_weighted" that weighted by their pairs
    (SentEval's); beside them pearson_all, pearson_mean and pairs.
    """

    def __init__(self, encoder: Encoder, data: SimilaritySet) -> None:
        self.encoder, self.data = encoder, data
        self.name = f"textual/{data.name}"

    def run(self, variables: Any) -> dict[str, float]:
        """The metrics that the class names; `variables` is what `TwoTowers.apply` takes."""
        return self.measure(variables)[0]

    def measure(self, variables: Any) -> tuple[dict[str, float], dict[str, Items]]:
        """The metrics, and the items of those that can be resampled."""
        pairs = [pair for part in self.data.subsets.values() for pair in part]
        texts = [pair[side] for side in (0, 1) for pair in pairs]
        e = embedding(self.encoder.texts(variables, texts, ("z", "s")), self.encoder.tau)
        return correlations(self.name, (e[: len(pairs)] * e[len(pairs) :]).sum(axis=1), self.data)


def correlations(name: str, cosine: np.ndarray, data: SimilaritySet) -> tuple[dict[str, float], dict[str, Items]]:
    """The metrics of `Similarity` for the cosines (pairs,), in the order of the subsets."""
    gold = np.array([pair[2] for part in data.subsets.values() for pair in part], np.float64)
    ends = np.cumsum([len(part) for part in data.subsets.values()])
    parts = list(zip(np.split(cosine, ends[:-1]), np.split(gold, ends[:-1]), strict=True))
    by_rank, linear = ([100 * f(*part) for part in parts] for f in (spearman, pearson))
    item = Items(cosine, other=gold, statistic="spearman")
    found = {
        "spearman_all": item.value(),
        "spearman_mean": np.mean(by_rank),
        "spearman_weighted": np.average(by_rank, weights=[len(part) for part in data.subsets.values()]),
        "pearson_all": 100 * pearson(cosine, gold),
        "pearson_mean": np.mean(linear),
        "pairs": len(gold),
    }
    if len(parts) > 1:
        found |= {f"{subset}/spearman": value for subset, value in zip(data.subsets, by_rank, strict=True)}
    return {f"{name}/{key}": float(value) for key, value in found.items()}, {f"{name}/spearman_all": item}


@dataclasses.dataclass(frozen=True, eq=False)
class TextRetrievalSet:
    """Texts that mean the same as one of `texts`.

    Attributes:
      name: in the metrics' names.
      texts: what is found, all distinct.
      queries: (query, index of its text).
      groups: bool (queries,) of named parts, such as one for each language; the value is then their unweighted mean.
    """

    name: str
    texts: Sequence[str]
    queries: Sequence[tuple[str, int]]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    card: Card = dataclasses.field(default_factory=Card)

    def __post_init__(self) -> None:
        if not self.queries or not all(0 <= i < len(self.texts) for _, i in self.queries):
            raise UserError(f"{self.name}: {len(self.queries)} queries; each must name one of {len(self.texts)} texts.")
        for group, mask in self.groups.items():
            if np.shape(mask) != (len(self.queries),) or not np.any(mask):
                raise UserError(f"{self.name}: group {group!r} must be a bool for each query, not all False.")


class TextRetrieval:
    """Share of queries whose text is among the k nearest by cosine: "textual/<set>[/<group>]/r1", r5 and r10."""

    def __init__(self, encoder: Encoder, data: TextRetrievalSet) -> None:
        self.encoder, self.data = encoder, data
        self.name = f"textual/{data.name}"

    def run(self, variables: Any) -> dict[str, float]:
        """The metrics that the class names; `variables` is what `TwoTowers.apply` takes."""
        return self.measure(variables)[0]

    def measure(self, variables: Any) -> tuple[dict[str, float], dict[str, Items]]:
        """The metrics, and the items of those that can be resampled."""
        n, queries = len(self.data.texts), self.data.queries
        texts = [*self.data.texts, *(text for text, _ in queries)]
        e = embedding(self.encoder.texts(variables, texts, ("z", "s")), self.encoder.tau)
        right = np.arange(n) == np.array([i for _, i in queries])[:, None]
        found = ranks(e[n:] @ e[:n].T, right)
        weights = np.ones(len(queries))
        if self.data.groups:
            weights = sum(mask / mask.sum() for mask in self.data.groups.values())
        items = {f"{self.name}/r{k}": Items((found < k).astype(float), weights) for k in KS}
        metrics = {key: item.value() for key, item in items.items()}
        for group, mask in self.data.groups.items():
            metrics |= {f"{self.name}/{group}/r{k}": 100 * float((found[mask] < k).mean()) for k in KS}
        return metrics | {f"{self.name}/queries": float(len(queries)), f"{self.name}/texts": float(n)}, items
