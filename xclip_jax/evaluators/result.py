"""Results of evaluations as records, their names on disk, and their JSON."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xclip_jax.addresses import public
from xclip_jax.evaluators.provenance import Provenance
from xclip_jax.evaluators.statistics import PerExample

# Correlations, and precision averaged over a ranking.
_TIMES_100 = ("spearman", "spearman_all", "spearman_mean", "pearson", "matthews", "map", "map11", "roc_auc")


UNITS = ("%", "x 100", "rank", "")  # of this package's evaluators


def unit_of(metric: str) -> str:
    """Return the unit of a metric whose results name none: "x 100" of correlations and the like, else "%"."""
    return "x 100" if metric.rpartition("/")[2] in _TIMES_100 else "%"


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One number of an evaluation.

    Attributes:
      set: name of the evaluation set, addresses in it without passwords and signatures.
      family: what is measured: "zeroshot", "retrieval", "visual", "textual", or a name of the evaluator's own.
      metric: "top1", "image_to_text/r1"; also the sizes of the set, such as "n".
      value: a share in percent, a correlation times 100, or a plain number.
      unit: "%" of shares of the items, for which a binomial interval holds; "x 100" of correlations, average precision,
        areas and other numbers times 100; "rank" from 1; "" of plain numbers.
      n: number of items that it is measured on, 0 where unknown.
      chance: value of a random answer, in `unit`; with the unit "%" the share of items that are right by chance. None
        where no such level exists.
      protocol: provenance of the set and protocol of the measurement.
      items: per-example values for the bootstrap; None where the metric cannot be resampled.
      task: one of several questions about the same items, such as "category".
      score: one of several similarities that a model gives, such as "cross_entropy"; "" is the model's own.
      group: a part of the items.
      headline: whether it is the number to report of its set.
      evaluator: name of the evaluator, as its set has it; "" in results of earlier versions.
    """

    set: str
    family: str
    metric: str
    value: float
    unit: str = "%"
    n: int = 0
    chance: float | None = None
    protocol: Provenance = dataclasses.field(default_factory=Provenance)
    items: PerExample | None = None
    task: str = ""
    score: str = ""
    group: str = ""
    headline: bool = False
    evaluator: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", public(self.set))

    @property
    def key(self) -> str:
        """Name within the set, as in evaluation.json."""
        return "/".join(filter(None, (self.task, self.score, self.group, self.metric)))

    @property
    def name(self) -> str:
        """Name in metrics.jsonl, results.json and TensorBoard: "zeroshot/emoji/test_concepts/top1"."""
        return "/".join(filter(None, (self.family, self.set, self.key)))


def flat(results: Iterable[Result]) -> dict[str, float]:
    """Return {name on disk: value}, in the order of the results."""
    return {result.name: result.value for result in results}


def items(results: Iterable[Result]) -> dict[str, PerExample]:
    """Return {name on disk: items} of the results that can be resampled."""
    return {result.name: result.items for result in results if result.items is not None}


_SAVED = ("set", "family", "metric", "value", "unit", "n", "chance", "task", "score", "group", "headline", "evaluator")
_PROTOCOL = ("role", "split_hash")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Result)}


def to_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return records for a JSON file, without items, and of protocols with role and hash of the data alone.

    Fields that have their default are left out.
    """
    records = []
    for result in results:
        fields = {key: getattr(result, key) for key in _SAVED}
        protocol = {key: value for key in _PROTOCOL if (value := getattr(result.protocol, key))}
        records.append({key: value for key, value in fields.items() if value != _DEFAULTS[key]} | protocol)
    return records


def from_json(records: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Return the results that `to_json` wrote; keys of later versions are ignored.

    Earlier versions had percent for all that `unit_of` knows better.
    """
    return [
        Result(**_fields(record), protocol=Provenance(**{key: record.get(key, "") for key in _PROTOCOL}))
        for record in records
    ]


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    saved = {key: record[key] for key in _SAVED if key in record}
    # JSON has null for a value that is not a number.
    return {"unit": unit_of(record["metric"])} | saved | ({"value": math.nan} if record["value"] is None else {})
