"""What a study declares: arms, measures, claims and charts; plain data and its checks."""

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xclip_jax.core.errors import UserError

DEFAULT = "icons"  # study
SECTIONS = ("tuning", "core", "controls", "dose", "factors")  # in the order of worth, in which they are run
ON_VALIDATION = ("tuning", "factors")  # sections whose arms are never evaluated on tests


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
      name: by which claims and doses refer to it.
      label: for people to read.
      set: an evaluation set, or "" for the metrics of the last training step.
      metric: `Result.key` within the set, "" for its headline; or the name of a training metric.
      higher: whether more is better.
      ratio: whether its logarithm is averaged and compared, as of ranks: means are then geometric and differences
        ratios.
      digits: behind the point.
      family: what of the paper's third claim it stands for, see `arms.claims`; "" for nothing.
      what: its definition, for people to read.
    """

    name: str
    label: str
    set: str
    metric: str = ""
    higher: bool = True
    ratio: bool = False
    digits: int = 1
    family: str = ""
    what: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting, run with several seeds. Two arms of one config share their runs.

    Attributes:
      name: unique; letters, digits, "_" and "." in file names.
      title: for tables.
      section: one of `SECTIONS`; arms of `ON_VALIDATION` are evaluated on validation sets only.
      recipe: as of --config: "studies/icons/recipe.py:objective=clip".
      changes: {config key: value}, applied after the study's.
      seeds: of its runs.
      objective: what the arm is a candidate for: of "tuning" an objective's recipe, of "factors" what `Study.search`
        looks for; "" for none.
      tuned: the objective whose chosen candidate the arm takes over; "" for none.
      length: multiplies the steps, and the warm-up, which keeps its share.
    """

    name: str
    title: str
    section: str
    recipe: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    objective: str = ""
    tuned: str = ""
    length: float = 1.0


@dataclasses.dataclass(frozen=True)
class ClaimPart:
    """A comparison that a claim consists of: arm `a` less arm `b`.

    Attributes:
      text: what is claimed.
      a, b: names of arms, or of a choice of the study.
      measure: name of a measure.
      better: whether `a` is claimed to be better than `b`, or worse.
      margin: by how much `a` may be worse and still "at least as good", in units of the measure; 0 claims a difference.
    """

    text: str
    a: str
    b: str
    measure: str
    better: bool = True
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence that holds if all of its parts do.

    Attributes:
      text, parts: the sentence, and the comparisons that it stands for.
      short: the sentence in a few words, for a README.
      all_choices: whether the page shows the parts for the arms of a choice that were not chosen too.
      tuned_on_seeds: seeds with which its arms' setting was chosen; the page shows the parts without these too.
    """

    text: str
    parts: Sequence[ClaimPart]
    short: str = ""
    all_choices: bool = False
    tuned_on_seeds: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class DoseResponse:
    """What becomes of some arms as one thing changes: a table for each measure, a chart of the first.

    Attributes:
      name: of its file.
      title: of the chart.
      axis: what changes.
      levels: values of the axis, as labels.
      lines: {label: an arm for each level}.
      measures: names of measures.
      controls: (arm, control arm, what the difference shows), of one level.
    """

    name: str
    title: str
    axis: str
    levels: Sequence[str]
    lines: Mapping[str, Sequence[str]]
    measures: Sequence[str]
    controls: Sequence[tuple[str, str, str]] = ()


@dataclasses.dataclass(frozen=True)
class ExtraComparisons:
    """Differences that the page and a README show in addition to the claims.

    Attributes:
      text: heading of the table.
      rows: names of what is subtracted.
      columns: {name: for each row, or the first of them, an arm and what is subtracted from it}.
      measures: names of measures, all in each cell.
      sentence: the same in a README, with {0}, {1} ... for the rows of the first column.
    """

    text: str
    rows: Sequence[str]
    columns: Mapping[str, Sequence[tuple[str, str]]]
    measures: Sequence[str]
    sentence: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A declared study.

    Attributes:
      title: of its page.
      about: paragraphs about data, models and measures.
      arms: all of them.
      changes: {config key: value} of all arms.
      validation, tests: evaluation sets. Tests are evaluated once, at the end of runs that are not tuning.
      named: {validation set: measure of tests by which of its similarities, chosen on that set, a model is also read}.
      choose: the measure by which recipes are tuned and choices made; on a validation set.
      choices: {name: arms}; the name stands for the arm that is best on validation.
      measures: columns of the tables.
      claims: that are tested.
      baseline: arm that the others of the core are compared with.
      common: {title: arm} of all objectives at one recipe.
      controls: (arm or choice, control arm, what the difference shows).
      floor: the control that is the baseline again but for rounding: differences from it show how far noise goes.
      tuned_comparisons: (arm, what is subtracted, what that shows) of arms with the settings that the factors chose.
      tuned_controls: the same with controls subtracted.
      secondary: measures that have a table of their own and no part in a verdict.
      shown: (names of arms or choices, names of measures): differences from the baseline in a README's plot.
      extra_comparisons: differences that the page and a README show in addition to the claims.
      weights: {label: arm} along the weight of a term: differences from the baseline, at its left end, are drawn.
      doses: charts.
      factors: measures of the arms of section "factors".
      search: the measure, on a validation set that arms of "factors" have in addition, by which their candidates
        are compared.
      threats: to the validity of the conclusions.
      seconds_per_pair: a first guess, until runs are measured.
      name: of the flag --study.
      recipe: of the flag --recipe, "" for the study's own.
      scope: of the finding in a README: on which data and models, in which units.
      changed: paragraphs on what was changed in the rule, in arms or in the page after runs were seen.
      commits: a note on the commits of its runs.
    """

    title: str
    about: Sequence[str]
    arms: Sequence[Arm]
    changes: Mapping[str, Any]
    validation: Sequence[str]
    tests: Sequence[str]
    choose: Measure
    measures: Sequence[Measure]
    claims: Sequence[Claim]
    baseline: str
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    common: Mapping[str, str] = dataclasses.field(default_factory=dict)
    controls: Sequence[tuple[str, str, str]] = ()
    floor: str = ""
    tuned_comparisons: Sequence[tuple[str, str, str]] = ()
    tuned_controls: Sequence[tuple[str, str, str]] = ()
    secondary: Sequence[Measure] = ()
    shown: tuple[Sequence[str], Sequence[str]] = ((), ())
    extra_comparisons: ExtraComparisons | None = None
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doses: Sequence[DoseResponse] = ()
    factors: Sequence[Measure] = ()
    search: Measure | None = None
    threats: Sequence[str] = ()
    seconds_per_pair: float = 2e-3
    name: str = DEFAULT
    recipe: str = ""
    scope: str = ""
    changed: Sequence[str] = ()
    commits: str = ""

    @property
    def command(self) -> str:
        """The command that runs it."""
        name = "" if self.name == DEFAULT else f" --study {self.name}"
        recipe = f" --recipe {shlex.quote(self.recipe)}" if self.recipe else ""
        # The folder `docs` has the page of the study's own recipe.
        folder = " --docs FOLDER" if self.recipe and self.name == DEFAULT else ""
        return f"python -m studies{name}{recipe}{folder}"

    def sets_of(self, arm: Arm) -> tuple[str, ...]:
        """Return the validation sets of an arm."""
        more = (self.search.set,) if self.search and arm.section == "factors" else ()
        return tuple(dict.fromkeys((*self.validation, *more)))

    def arm(self, name: str) -> Arm:
        """Return the arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def measure(self, name: str) -> Measure:
        """Return the measure of a name."""
        return next(measure for measure in self.measures if measure.name == name)

    def of_section(self, section: str) -> list[Arm]:
        """Return the arms of a section."""
        return [arm for arm in self.arms if arm.section == section]


def _repeated(names: Iterable[str]) -> str | None:
    listed = list(names)
    return next((name for name in listed if listed.count(name) > 1), None)


def check(study: Study) -> None:
    """Check that names refer to something.

    Raises:
      UserError: what is wrong with the declaration.
    """
    names = [arm.name for arm in study.arms]
    if twice := _repeated([*names, *study.choices]):
        raise UserError(f"the study has two arms or choices {twice!r}; rename one.")
    if study.choose.set not in study.validation:
        raise UserError(f"choose uses the set {study.choose.set!r}; expected a set of `validation`.")
    if both := {*study.validation, *((study.search.set,) if study.search else ())} & set(study.tests):
        raise UserError(f"set {min(both)!r} is for validation and for tests; remove it from one of them.")
    tuning = {arm.objective for arm in study.of_section("tuning")}
    searched = {arm.objective for arm in study.of_section("factors")} - {""}
    if searched and not study.search:
        raise UserError(
            f"section 'factors' has candidates for {min(searched)!r}; say by `search` how they are compared."
        )
    for arm in study.arms:
        where = f"arm {arm.name!r}"
        if arm.section not in SECTIONS:
            raise UserError(f"{where}: section is {arm.section!r}; expected one of {', '.join(SECTIONS)}.")
        if not re.fullmatch(r"[A-Za-z0-9_.]+", arm.name):
            raise UserError(f"{where}: a name has letters, digits, '_' and '.', since files have it.")
        if (arm.section == "tuning" and (arm.tuned or not arm.objective)) or (
            arm.objective and arm.section not in ON_VALIDATION
        ):
            raise UserError(
                f"{where}: arms of section 'tuning' have an objective and no tuned; of the others only those of "
                "'factors' may have an objective."
            )
        if arm.tuned and arm.tuned not in (tuning if arm.section == "factors" else tuning | searched):
            raise UserError(f"{where}: no arm that is chosen before has the objective {arm.tuned!r}.")
    if unknown := [name for name in study.named if name not in study.validation]:
        raise UserError(f"named has the set {unknown[0]!r}; expected sets of `validation`.")
    measures = [measure.name for measure in study.measures]
    parts = [part for claim in study.claims for part in claim.parts]
    used = [name for part in parts for name in (part.a, part.b)]
    extra = study.extra_comparisons
    pairs = [pair for column in extra.columns.values() for pair in column] if extra else []
    of_doses = (contrast for dose in study.doses for contrast in dose.controls)
    contrasts = (*study.controls, *study.tuned_comparisons, *study.tuned_controls, *of_doses)
    used += [name for pair in (*((a, b) for a, b, _ in contrasts), *pairs) for name in pair]
    used += [arm for dose in study.doses for line in dose.lines.values() for arm in line]
    used += [study.baseline, *study.common.values(), *study.shown[0], *study.weights.values()]
    used += [study.floor] if study.floor else []
    inner = [arm for arms in study.choices.values() for arm in arms]
    if unknown := [name for name in used if name not in (*names, *study.choices)] + [
        n for n in inner if n not in names
    ]:
        raise UserError(f"the study refers to arm {unknown[0]!r}, which it does not have.")
    referred = [*(part.measure for part in parts), *study.named.values()]
    referred += [
        *study.shown[1],
        *(extra.measures if extra else ()),
        *(name for dose in study.doses for name in dose.measures),
    ]
    if unknown := [name for name in referred if name not in measures]:
        raise UserError(f"the study refers to measure {unknown[0]!r}, which it does not have.")
