"""What an evaluator is, what a kind of evaluation set is, and how tables show their results."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.result import Result, flat


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is called: `name` in results, `short` in one line, `label` in a report."""

    name: str
    short: str
    label: str


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: its head, the metric that it shows, its format with the least width, and that of the column
    behind it for the chance level; without the latter there is none."""

    title: str
    metric: str
    form: str
    chance: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of results, one row for each set.

    Attributes:
      title: head of the column of names.
      families: of the results that it shows.
      metrics: what it shows, in the order of importance; a set with any of them belongs to the table.
      columns: none for a table with one line for each metric.
      scores: {score: label} of those that have a row of their own below the set's.
      reference: a set of the family; rows of `SHIFTED` sets say how much less than it they reach.
      chance: whether lines of a table without columns show the chance level.
    """

    title: str
    families: tuple[str, ...]
    metrics: tuple[Metric, ...] = ()
    columns: tuple[Column, ...] = ()
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference: str = ""
    chance: bool = False


class Evaluator(abc.ABC):
    """A protocol on one set, built once with its data and run as often as the trainer likes.

    With several processes every process calls `measure`, and every process gets the same numbers.

    Attributes:
      family: what it measures, the first part of its results' names; a class attribute, or set when it is built.
      layouts: tables of its results. Results of a family without one have a line each, with their chance level.
      encoder: of the model.
      data: the set. Its `name` and `card` go into the results.
    """

    family: str
    layouts: ClassVar[Sequence[Layout]] = ()

    def __init__(self, encoder: Encoder, data: Any) -> None:
        self.encoder, self.data = encoder, data

    @property
    def name(self) -> str:
        """What the names of its results begin with."""
        return f"{self.family}/{self.data.name}"

    @abc.abstractmethod
    def measure(self, variables: Any) -> list[Result]:
        """Return the results; `variables` is what `TwoTowers.apply` takes."""

    def run(self, variables: Any) -> dict[str, float]:
        """Return the results as {name: value}."""
        return flat(self.measure(variables))

    def result(self, metric: str, value: float, **fields: Any) -> Result:
        """A result of this evaluator's set; `fields` are the others of `Result`."""
        card = self.data.card
        result = Result(self.data.name, self.family, metric, float(value), protocol=card, **fields)
        return dataclasses.replace(result, headline=result.key == card.metric)

    def count(self, metric: str, value: float, **fields: Any) -> Result:
        """A plain number that goes with the results, such as the size of the set."""
        return self.result(metric, value, unit="", **fields)
