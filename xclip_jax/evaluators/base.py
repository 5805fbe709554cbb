"""Base classes for evaluators and kinds of evaluation sets, layouts of result tables, and sequences of items."""

import abc
import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from xclip_jax.core import fields, storage
from xclip_jax.core.errors import BadSample, UserError, redact
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data.base import LazySequence, display_name
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.data.records import as_bad_sample
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.results import Result, flat
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.models.two_towers import Variables

HELD_OUT = "holdout"
# Metrics in the unit "x 100" by default: correlations, and precision averaged over a ranking.
_TIMES_100 = ("spearman", "spearman_all", "spearman_mean", "pearson", "matthews", "map", "map11", "roc_auc")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: title of the column, and name of the metric in one-line summaries.
      label: name of the metric in a report; "" for sizes of the set and the like.
      chance: whether to show the chance level after the value.
    """

    title: str
    metric: str
    label: str = ""
    chance: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of results. Sets with a metric in a labelled column have a row.

    Attributes:
      title: title of the column of names.
      columns: columns; the first labelled one is the most important.
      scores: {score: label} of additional rows below the set's.
    """

    title: str
    columns: tuple[Column, ...]
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Evaluator(abc.ABC):
    """A protocol on one set, built once with its data and run as often as needed.

    All processes call `measure` and get the same numbers.

    Attributes:
      family: first part of the results' names; a class attribute, or set by `__init__`.
      layouts: tables of the results; a set without a layout shows its headline.
      encoder: the model's encoder.
      data: the set; results copy its `name`, `card` and `evaluator`.
    """

    family: str
    layouts: ClassVar[Sequence[Layout]] = ()

    def __init__(self, encoder: Encoder, data: Any) -> None:
        self.encoder, self.data = encoder, data

    @property
    def name(self) -> str:
        """Family and set, the beginning of the results' names."""
        return redact(f"{self.family}/{self.data.name}")

    @abc.abstractmethod
    def measure(self, variables: Variables) -> list[Result]:
        """Return the results; `variables` are the arguments of `TwoTowers.apply`."""

    def run(self, variables: Variables) -> dict[str, float]:
        """Return the results as {name: value}."""
        return flat(self.measure(variables))

    def result(self, metric: str, value: float | PerExample, **fields: Any) -> Result:
        """Return a result of this evaluator's set; `fields` are other fields of `Result`.

        Per-example values become the result's items, and give its value and n. `together` of the set groups them.
        """
        if isinstance(value, PerExample):
            fields = {"n": len(value.values), "items": value} | fields
            value = value.value()
        card = self.data.card
        unit = "x 100" if metric.rpartition("/")[2] in _TIMES_100 else "%"
        together = getattr(self.data, "together", None)
        if together is not None and fields.get("items") is not None:
            fields["items"] = dataclasses.replace(fields["items"], groups=together)
        fields = {"protocol": card, "evaluator": self.data.evaluator, "unit": unit} | fields
        result = Result(self.data.name, self.family, metric, float(value), **fields)
        return dataclasses.replace(result, headline=result.key == card.metric)

    def count(self, metric: str, value: float, **fields: Any) -> Result:
        """Return a unitless number reported with the results, such as the size of the set."""
        return self.result(metric, value, unit="", **fields)


@dataclasses.dataclass(frozen=True)
class Display:
    """How a report shows the sets of a kind.

    Attributes:
      panels: {set: (title, sentence)} of the first sets; {num_classes} in the sentence is replaced.
      queries: example texts for searching the images.
      credit: authors and licence of the images.
    """

    panels: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    queries: Sequence[str] = ()
    credit: str = ""


class SetKind(abc.ABC):
    """A kind of evaluation sets, recognised by the beginning of their names.

    A set has `name`, `card` (`Provenance`) and `evaluator`: a key of `registry.EVALUATORS` or "package.module:Class".

    Attributes:
      prefixes: first words of the names, up to "/", ":" or "@".
      suites: {name: sets evaluated together}.
      display: how a report shows the sets.
    """

    prefixes: ClassVar[Sequence[str]] = ()
    suites: ClassVar[Mapping[str, Sequence[str]]] = {}
    display: ClassVar[Display] = Display()

    @classmethod
    def knows(cls, spec: str) -> bool:
        """Return whether `load` accepts `spec`, which begins with one of `prefixes`; no file is read."""
        return bool(spec)

    @classmethod
    @abc.abstractmethod
    def load(cls, spec: str, prepare: Preprocessing, data: DataConfig, profile: Profile) -> Any:
        """Open the set `spec`, its images square and uint8.

        Args:
          spec: name of the set.
          prepare: preprocessing of the model's images.
          data: group `data` of the model's run, or of the run that holds out the set's pairs, with the command's root
            of TFDS data sets in `data.dir`.
          profile: protocol of the published sets.
        """

    @classmethod
    def extras(cls, spec: str) -> tuple[str, ...]:
        """Return the package's extras (setup.py) required by the set `spec`; nothing is opened."""
        return ()

    @classmethod
    def shows(cls, spec: str) -> str:
        """Return how reports show the set: "classes" for a `ZeroShotSet`, "captions" for a `RetrievalSet`, else ""."""
        return ""


def is_holdout(spec: str) -> bool:
    """Whether a set is retrieval/holdout[@RUN] or zeroshot/holdout[@RUN], held out of the training of a run."""
    return spec.partition("@")[0] in (f"retrieval/{HELD_OUT}", f"zeroshot/{HELD_OUT}")


def held_out_data(spec: str, data: DataConfig) -> DataConfig:
    """Return the `data` group of the run that holds out the pairs of `spec`, or `data` for all other sets."""
    if not is_holdout(spec):
        return data
    name, at, run = spec.partition("@")
    if at:
        content = RunReader(run).read_config() if run else None
        if content is None:
            raise UserError(f"{spec}: {run!r} is not the folder of a run with a config.json; name one, {name}@RUN.")
        faults: list[str] = []
        data = fields.read_group(DataConfig, content["config"]["data"], "data", faults)
        if faults:
            raise UserError(f"{spec}: the config of {run!r} cannot be read ({'; '.join(faults)}); name another run.")
    if not data.holdout or not data.sources:
        raise UserError(f"{spec}: the run holds out no pairs (data.holdout); name another one, {name}@RUN.")
    return data


def pictures(images: Sequence[Any], prepare: Preprocessing) -> LazySequence:
    """Decode and preprocess encoded images on access; a `BadSample` error has the image's name as a note."""

    def get(index: int) -> np.ndarray:
        try:
            try:
                image = images[index]
            except OSError as error:  # from another package's reader, such as an unavailable store
                raise storage.unreadable(error) from error
            except Exception as error:
                raise as_bad_sample(error) from error
            return prepare(image)
        except BadSample as error:
            error.add_note(f"image {display_name(images, index)!r}")
            raise

    return LazySequence(len(images), get)


def joined(parts: Sequence[Sequence[Any]]) -> LazySequence:
    """Concatenate sequences without loading their items."""
    starts = np.cumsum([0, *map(len, parts)])

    def place(index: int) -> tuple[Any, int]:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[part], index - int(starts[part])

    return LazySequence(int(starts[-1]), lambda i: operator.getitem(*place(i)), lambda i: display_name(*place(i)))
