"""Declaration of a study: arms, measures and claims as plain data."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xclip_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number measured in each run.

    Attributes:
      name: name by which claims refer to it.
      label: heading of its table column.
      set: an evaluation set.
      metrics: keys within the set, see `Result.key`, "" for its headline; their mean is the measure.
      higher: whether more is better.
      ratio: whether logarithms are compared, for instance of ranks: means are geometric, and differences are ratios.
      digits: digits after the decimal point.
    """

    name: str
    label: str
    set: str
    metrics: Sequence[str] = ("",)
    higher: bool = True
    ratio: bool = False
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting, run with several seeds. Arms with equal configs share their runs.

    Attributes:
      name: unique name, used in file names: letters, digits, "_" and ".".
      title: name in tables.
      recipe: a recipe as for --config: "studies/icons/recipe.py:objective=clip".
      changes: {config key: value}, applied after the study's changes.
      seeds: one run for each.
      tested: whether its runs are evaluated on test sets at their end; if False, choices may depend on them.
    """

    name: str
    title: str
    recipe: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    tested: bool = True


@dataclasses.dataclass(frozen=True)
class ClaimPart:
    """A comparison: the sum of one measure over the arms `plus`, minus the sum over the arms `minus`.

    One arm on each side is a difference; two on each side compare two differences.

    Attributes:
      text: the claimed sentence.
      measure: name of a measure.
      plus, minus: names of arms; "ARM:MEASURE" takes another measure of that arm.
      better: whether `plus` is claimed to be better than `minus`, or worse.
      margin: how much worse `plus` may be and still count as "at least as good"; 0 claims a difference.
    """

    text: str
    measure: str
    plus: Sequence[str]
    minus: Sequence[str]
    better: bool = True
    margin: float = 0.0

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
    """A declared study.

    Attributes:
      title: title of its page.
      arms: all arms.
      changes: {config key: value} for all arms.
      validation: evaluation sets for choices.
      tests: evaluation sets evaluated once, at the end of runs.
      measures: columns of the tables.
      claims: claims to be tested; their arms may be declared later.
    """

    title: str
    arms: Sequence[Arm]
    changes: Mapping[str, Any]
    validation: Sequence[str]
    tests: Sequence[str]
    measures: Sequence[Measure]
    claims: Sequence[Claim] = ()

    def sets_of(self, arm: Arm) -> tuple[str, ...]:
        """Return the validation sets of an arm."""
        return tuple(self.validation)

    def arm(self, name: str) -> Arm | None:
        """Return the arm with this name, or None if it is not declared."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def measure(self, name: str) -> Measure:
        """Return the measure with this name."""
        return next(measure for measure in self.measures if measure.name == name)


def check(study: Study) -> None:
    """Check names.

    Raises:
      UserError: a mistake in the declaration.
    """
    names = [arm.name for arm in study.arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the study has two arms {name!r}; rename one.")
        if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise UserError(f"arm {name!r}: use letters, digits, '_' and '.' alone, since file names contain it.")
    both = set(study.validation) & set(study.tests)
    if both:
        raise UserError(f"set {min(both)!r} is for validation and for tests; remove it from one of them.")
    known = [measure.name for measure in study.measures]
    for claim in study.claims:
        for part in claim.parts:
            for _, measure in (*part.terms(part.plus), *part.terms(part.minus)):
                if measure not in known:
                    raise UserError(f"a claim refers to measure {measure!r}; expected one of {', '.join(known)}.")
