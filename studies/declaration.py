"""Declaration of a study: arms, measures and claims as plain data."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number measured in each run.

    With `ratio` logarithms are compared, for instance of ranks: means are geometric, and differences are ratios.
    """

    name: str  # in claims
    label: str  # heading of its table column
    set: str  # an evaluation set
    metrics: Sequence[str] = ("",)  # keys within the set, see `Result.key`, "" for its headline; their mean is measured
    higher: bool = True  # whether more is better
    ratio: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting, run with several seeds. Arms with equal configs share their runs."""

    name: str  # unique, used in file names: letters, digits, "_" and "."
    title: str  # name in tables
    recipe: str  # as for --config: "studies/photographs/recipe.py:objective=clip"
    changes: Mapping[str, Any]  # {config key: value}, after the study's
    seeds: Sequence[int]  # one run for each
    tested: bool = True  # whether runs are evaluated on test sets at their end; if False, choices may depend on them


@dataclasses.dataclass(frozen=True)
class ClaimPart:
    """A comparison: the sum of one measure over the arms `plus` is better than the sum over the arms `minus`.

    One arm on each side is a difference; two on each side compare two differences.
    """

    text: str  # the claimed sentence
    measure: str  # name of a measure
    plus: Sequence[str]  # names of arms; "ARM:MEASURE" takes another measure of that arm
    minus: Sequence[str]

    def terms(self, side: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield the arm and the measure of each term in `plus` or `minus`."""
        for term in side:
            arm, _, measure = term.partition(":")
            yield arm, measure or self.measure


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that holds if all of its parts do."""

    text: str
    parts: Sequence[ClaimPart]


@dataclasses.dataclass(frozen=True)
class Study:
    """A declared study."""

    title: str  # of its page
    arms: list[Arm]  # to which the records of others may add
    changes: Mapping[str, Any]  # {config key: value} for all arms
    validation: Sequence[str]  # evaluation sets for choices; no others are evaluated before the end of a run
    measures: Sequence[Measure]  # columns of the tables
    claims: Sequence[Claim] = ()  # whose arms may be declared later

    def arm(self, name: str) -> Arm | None:
        """Return the arm with this name, or None if it is not declared."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def measure(self, name: str) -> Measure:
        """Return the measure with this name."""
        return next(measure for measure in self.measures if measure.name == name)
