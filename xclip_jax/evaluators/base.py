"""Base classes of evaluators and of kinds of evaluation sets, and the tables of an evaluator's results."""

import abc
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core.addresses import public
from xclip_jax.core.errors import BadSample
from xclip_jax.data import transforms
from xclip_jax.data.config import DataConfig
from xclip_jax.data.labelled import item_name
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Result, flat
from xclip_jax.models.two_towers import Variables

# Sets of the pairs that a run holds out of its training are named PROTOCOL/holdout.
HELD_OUT = "holdout"
# Metrics between -1 and 1: correlations, and precision averaged over a ranking.
_TIMES_100 = ("spearman", "spearman_all", "spearman_mean", "pearson", "matthews", "map", "map11", "roc_auc")


def unit_of(metric: str) -> str:
    """Return the default unit of a metric: "x 100" for correlations and the like, else "%"."""
    return "x 100" if metric.rpartition("/")[2] in _TIMES_100 else "%"


@dataclasses.dataclass(frozen=True)
class Metric:
    """Names of a metric: `name` in results, `short` in one line of text, `label` in a report."""

    name: str
    short: str
    label: str


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: its head.
      metric: what it shows.
      format: format specification with the least width, such as ">8".
      chance: that of a column with the chance level behind it; "" for none.
    """

    title: str
    metric: str
    format: str
    chance: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of an evaluator's results, one row for each set.

    Attributes:
      title: head of the column of names.
      families: of the results that it shows.
      metrics: what it shows, the most important one first; a set with any of them has a row.
      columns: empty for a table with one line for each metric.
      scores: {score: label} of those that have a row of their own below the set's.
      reference: a set of the family; rows of `SHIFTED` sets show how much lower than it they are.
      chance: whether a table without columns shows the chance level.
    """

    title: str
    families: tuple[str, ...]
    metrics: tuple[Metric, ...] = ()
    columns: tuple[Column, ...] = ()
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference: str = ""
    chance: bool = False


class Evaluator(abc.ABC):
    """A protocol on one set, built once with its data and run as often as needed.

    With several processes every process calls `measure`, and every process gets the same numbers.

    Attributes:
      family: what it measures, the first part of its results' names; a class attribute, or set when it is built.
      layouts: tables of its results. Results without one have a line each, with their chance level.
      inputs: attributes of sets that hold items to encode; images among them are decoded in a first check.
      encoder: of the model.
      data: the set. Its `name`, `card` and `evaluator` are copied to the results.
    """

    family: str
    layouts: ClassVar[Sequence[Layout]] = ()
    inputs: ClassVar[Sequence[str]] = ("images", "items")

    def __init__(self, encoder: Encoder, data: Any) -> None:
        self.encoder, self.data = encoder, data

    @property
    def name(self) -> str:
        """Family and set: the beginning of its results' names."""
        return public(f"{self.family}/{self.data.name}")

    @abc.abstractmethod
    def measure(self, variables: Variables) -> list[Result]:
        """Return the results; `variables` are those that `TwoTowers.apply` takes."""

    def run(self, variables: Variables) -> dict[str, float]:
        """Return the results as {name: value}."""
        return flat(self.measure(variables))

    def result(self, metric: str, value: float, **fields: Any) -> Result:
        """Return a result of this evaluator's set; `fields` are further ones of `Result`."""
        card = self.data.card
        fields = {"protocol": card, "evaluator": self.data.evaluator, "unit": unit_of(metric)} | fields
        result = Result(self.data.name, self.family, metric, float(value), **fields)
        return dataclasses.replace(result, headline=result.key == card.metric)

    def count(self, metric: str, value: float, **fields: Any) -> Result:
        """Return a plain number that accompanies the results, such as the size of the set."""
        return self.result(metric, value, unit="", **fields)


class SetKind(abc.ABC):
    """A kind of evaluation sets, recognised by the beginning of their names.

    A set is an object with `name`, `card` (its `Provenance`) and `evaluator`: the name of its protocol in
    `registry.EVALUATORS`, or "package.module:Class".

    Attributes:
      prefixes: first words of the names, up to "/", ":" or "@".
      names: complete names of sets, as far as they can be listed.
      at_path: names that are followed by a path, NAME@PATH.
      usage: how other sets are named, for --help.
      suites: {name: names of sets} that are evaluated together.
      panels: {name: (title, sentence)} of sets that a report shows before others; {num_classes} in the sentence is
        replaced by their number.
      queries: texts with which a report searches the images.
      credit: makers and licence of the images, for pages that show some.
      sources: types of training sources with the same images, such as "demo" of demo:train.
    """

    prefixes: ClassVar[Sequence[str]] = ()
    names: ClassVar[Sequence[str]] = ()
    at_path: ClassVar[Sequence[str]] = ()
    usage: ClassVar[str] = ""
    suites: ClassVar[Mapping[str, Sequence[str]]] = {}
    panels: ClassVar[Mapping[str, tuple[str, str]]] = {}
    queries: ClassVar[Sequence[str]] = ()
    credit: ClassVar[str] = ""
    sources: ClassVar[Sequence[str]] = ()

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Return whether `load` accepts the name `spec`, which begins with one of `prefixes`; no file is read."""
        return bool(spec)

    @classmethod
    def closest(cls, spec: str) -> list[str]:
        """Return the names that are spelled like `spec`, which is unknown."""
        return closest(spec, cls.names, cls.at_path)

    @classmethod
    @abc.abstractmethod
    def load(cls, spec: str, prepare: Preprocessing | int, data_dir: str | None, profile: Profile) -> Any:
        """Return the set `spec`, its images square and uint8; the arguments are those of `registry.load`."""

    @classmethod
    def data_of(cls, spec: str, data: DataConfig) -> DataConfig:
        """Return the keys that the set is read with, before the command's own: those of the model's run, `data`."""
        return data

    @classmethod
    def open(cls, spec: str, prepare: Preprocessing | int, data: DataConfig, profile: Profile) -> Any:
        """Return the set as `load` does; a kind that reads pairs as a run does uses all keys of `data`.

        Args:
          spec, prepare, profile: as of `load`.
          data: what `data_of` returns, with the command's root of TFDS data sets where it names one.
        """
        return cls.load(spec, prepare, data.dir or None, profile)

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return what a report shows of a set: "classes" of a `ZeroShotSet`, "captions" of a `RetrievalSet`, or ""."""
        return ""


def are_texts(items: Sequence[Any]) -> bool:
    """Whether items are texts, or tuples of them; a first image that cannot be decoded is an image."""
    try:
        return isinstance(items[0], (str, tuple))
    except BadSample:
        return False


def closest(spec: str, names: Iterable[str], at_path: Iterable[str]) -> list[str]:
    """Return up to three names that are spelled like `spec`, in the form in which a user writes them."""
    written = {name: f"{name}@PATH" for name in at_path} | {name: name for name in names}
    return [written[name] for name in difflib.get_close_matches(spec.partition("@")[0], written, n=3)]


class Pictures(Sequence):
    """Encoded images, preprocessed for a model; a `BadSample` error has the image's name as a note."""

    def __init__(self, images: Sequence[Any], prepare: Preprocessing, border: int = 0) -> None:
        self._images, self._prepare, self._border = images, prepare, border

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:  # ty: ignore[incompatible-method-override] no slices
        try:
            image = self._images[index]
            if self._border or not isinstance(image, bytes):
                image = transforms.decode(image, background=self._prepare.background)
            if self._border:
                image = image[self._border : -self._border, self._border : -self._border]
            return self._prepare(image)
        except BadSample as error:
            error.add_note(f"image {item_name(self._images, index)!r}")
            raise


class Joined(Sequence):
    """Concatenation of sequences, without loading their items."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part, place = self._place(index)
        return part[place]

    def name(self, index: int) -> str:
        """Return what names an item to a person."""
        return item_name(*self._place(index))

    def _place(self, index: int) -> tuple[Sequence[Any], int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)
