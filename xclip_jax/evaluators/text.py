"""Textual representation: similarity of sentences, retrieval of texts by texts. `probe.Probe` probes texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators.base import Column, Evaluator, Layout, Metric
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.results import Provenance, Result
from xclip_jax.evaluators.retrieval import BLOCK, KS
from xclip_jax.evaluators.statistics import PerExample, pearson, ranks, spearman
from xclip_jax.models.two_towers import Variables
from xclip_jax.objectives.similarity import features

Pair = tuple[str, str, float]


def embeddings(encoder: Encoder, variables: Variables, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors (n, e) by which texts are compared, those of the model's own similarity."""
    (feature,) = features(encoder.similarities[:1])
    return encoder.similarities[0].embedding(encoder.texts(variables, texts, (feature,))[feature])


def nearest_ranks(queries: np.ndarray, items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return how many items are nearer to each query than its target, int (queries,), see `statistics.ranks`.

    The scores are computed for a block of queries at a time, and never held whole.

    Args:
      queries, items: embeddings (queries, e) and (items, e).
      targets: index of an item for each query, int (queries,).
    """
    step = max(1, BLOCK // len(items))
    starts = range(0, len(queries), step)
    return np.concatenate([ranks(queries[i : i + step] @ items.T, targets[i : i + step]) for i in starts])


@dataclasses.dataclass(frozen=True, eq=False)
class SimilaritySet:
    """Pairs of sentences and their similarity as people rated it.

    Attributes:
      name: in the metrics' names.
      subsets: name -> (sentence, sentence, gold), at least two; one for sets that have no parts.
    """

    evaluator: ClassVar[str] = "similarity"

    name: str
    subsets: Mapping[str, Sequence[Pair]]
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for subset, pairs in self.subsets.items():
            if len(pairs) < 2:
                raise UserError(f"{self.name}: subset {subset!r} has {len(pairs)} pairs; a correlation needs two.")
        if not self.subsets:
            raise UserError(f"{self.name}: the set has no pairs.")


class SentenceSimilarity(Evaluator):
    """Correlation of cosine and gold, times 100, without training; named "textual/<set>/<metric>".

    Two conventions that differ by several points, side by side: "spearman_all" is Spearman's over all pairs in one list
    (SimCSE's), "spearman_mean" the unweighted mean over subsets, "spearman_weighted" that weighted by their pairs
    (SentEval's); beside them pearson_all, pearson_mean and pairs.
    """

    family = "textual"
    layouts = (
        Layout(
            "similarity of texts, Spearman x 100",
            ("textual",),
            (
                Metric("spearman_all", "spearman_all", "Spearman"),
                Metric("spearman_mean", "spearman_mean", "Spearman, mean of the subsets"),
            ),
            (
                Column("pairs", "pairs", ">14"),
                Column("all", "spearman_all", ">8"),
                Column("mean", "spearman_mean", ">15"),
            ),
        ),
    )

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class names."""
        pairs = [pair for part in self.data.subsets.values() for pair in part]
        texts = [pair[side] for side in (0, 1) for pair in pairs]
        e = embeddings(self.encoder, variables, texts)
        return self.correlations((e[: len(pairs)] * e[len(pairs) :]).sum(axis=1))

    def correlations(self, cosine: np.ndarray) -> list[Result]:
        """Return the results for the cosines (pairs,), in the order of the subsets."""
        subsets = self.data.subsets
        gold = np.array([pair[2] for part in subsets.values() for pair in part], np.float64)
        ends = np.cumsum([len(part) for part in subsets.values()])
        parts = list(zip(np.split(cosine, ends[:-1]), np.split(gold, ends[:-1]), strict=True))
        by_rank, linear = ([100 * f(*part) for part in parts] for f in (spearman, pearson))
        items, shared = PerExample(cosine, other=gold, statistic="spearman"), {"unit": "x 100", "n": len(gold)}
        results = [self.result("spearman_all", items.value(), items=items, **shared)]
        values: dict[str, Any] = {
            "spearman_mean": np.mean(by_rank),
            "spearman_weighted": np.average(by_rank, weights=[len(part) for part in subsets.values()]),
            "pearson_all": 100 * pearson(cosine, gold),
            "pearson_mean": np.mean(linear),
        }
        results += [self.result(key, value, **shared) for key, value in values.items()]
        results.append(self.count("pairs", len(gold)))
        if len(parts) > 1:
            for (subset, pairs), value in zip(subsets.items(), by_rank, strict=True):
                results.append(self.result("spearman", value, group=subset, unit="x 100", n=len(pairs)))
        return results


@dataclasses.dataclass(frozen=True, eq=False)
class TextRetrievalSet:
    """Texts that mean the same as one of `texts`.

    Attributes:
      name: in the metrics' names.
      texts: the items of the retrieval, all distinct.
      queries: (query, index of its text).
      groups: bool (queries,) of named parts, such as one for each language; the value is then their unweighted mean.
    """

    evaluator: ClassVar[str] = "text_retrieval"

    name: str
    texts: Sequence[str]
    queries: Sequence[tuple[str, int]]
    groups: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    card: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not self.queries or not all(0 <= i < len(self.texts) for _, i in self.queries):
            raise UserError(f"{self.name}: {len(self.queries)} queries; each must name one of {len(self.texts)} texts.")
        for group, mask in self.groups.items():
            if np.shape(mask) != (len(self.queries),) or not np.any(mask):
                raise UserError(f"{self.name}: group {group!r} must be a bool for each query, not all False.")


class TextRetrieval(Evaluator):
    """Share of queries whose text is among the k nearest by cosine: "textual/<set>[/<group>]/r1", r5 and r10."""

    family = "textual"
    layouts = (
        Layout(
            "texts by texts, recall %",
            ("textual",),
            (Metric("r1", "R@1", "R@1"), Metric("r5", "R@5", "R@5")),
            (
                Column("texts", "texts", ">6"),
                Column("queries", "queries", ">8"),
                Column("R@1", "r1", ">8", chance=">7"),
                Column("R@5", "r5", ">8", chance=">7"),
            ),
        ),
    )

    def measure(self, variables: Variables) -> list[Result]:
        """Return the results that the class names."""
        n, queries, groups = len(self.data.texts), self.data.queries, self.data.groups
        texts = [*self.data.texts, *(text for text, _ in queries)]
        e = embeddings(self.encoder, variables, texts)
        rank = nearest_ranks(e[n:], e[:n], np.array([target for _, target in queries]))
        weights = np.ones(len(queries))
        if groups:
            weights = sum(mask / mask.sum() for mask in groups.values())
        chance, results = {k: 100 * min(k / n, 1) for k in KS}, []
        for k in KS:
            items = PerExample((rank < k).astype(float), weights)
            results.append(self.result(f"r{k}", items.value(), n=len(queries), chance=chance[k], items=items))
        for group, mask in groups.items():
            for k in KS:
                value = 100 * float((rank[mask] < k).mean())
                results.append(self.result(f"r{k}", value, n=int(mask.sum()), chance=chance[k], group=group))
        return [*results, self.count("queries", len(queries)), self.count("texts", n)]
