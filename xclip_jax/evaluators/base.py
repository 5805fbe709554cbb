"""What an evaluator is, what a kind of evaluation set is, and how tables show their results."""

import abc
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import Profile
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


class SetKind(abc.ABC):
    """A kind of evaluation sets: those whose names begin alike.

    A set is an object with `name`, `card` and `evaluator`: the protocol that it is for, a name in
    `registry.EVALUATORS` or "package.module:Class".

    Attributes:
      prefixes: the first words of the names, up to "/", ":" or "@".
      names: complete names of sets, as far as there is a list of them.
      at_path: names that a path follows, NAME@PATH.
      usage: how else its sets are named, for --help.
      panels: {name: (title, sentence)} of sets that a report shows before others; the sentence may contain {ways}.
      queries: texts that a report searches the images with.
      credit: who made the images, for a page that shows some.
    """

    prefixes: ClassVar[Sequence[str]] = ()
    names: ClassVar[Sequence[str]] = ()
    at_path: ClassVar[Sequence[str]] = ()
    usage: ClassVar[str] = ""
    panels: ClassVar[Mapping[str, tuple[str, str]]] = {}
    queries: ClassVar[Sequence[str]] = ()
    credit: ClassVar[str] = ""

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Whether `spec`, which begins with one of `prefixes`, is a name that `load` accepts; no file is read."""
        return bool(spec)

    @classmethod
    def closest(cls, spec: str) -> list[str]:
        """Names that are spelled like `spec`, which is unknown."""
        return closest(spec, cls.names, cls.at_path)

    @classmethod
    @abc.abstractmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> Any:
        """Return the set `spec`, its images square and uint8; the arguments are those of `registry.load`."""

    @classmethod
    def shows(cls, spec: str) -> str:
        """What a report can show of a set: "classes" of a `ZeroShotSet`, "captions" of a `RetrievalSet`, or ""."""
        return ""


def closest(spec: str, names: Iterable[str], at_path: Iterable[str]) -> list[str]:
    """Up to three of the names that are spelled like `spec`, as a user writes them."""
    written = {name: f"{name}@PATH" for name in at_path} | {name: name for name in names}
    return [written[name] for name in difflib.get_close_matches(spec.partition("@")[0], written, n=3)]
