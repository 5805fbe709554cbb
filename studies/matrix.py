"""The runs of a declared study: their configs, which of them are finished, and how long the others will take."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections

from studies.declaration import ON_VALIDATION, SECTIONS, Arm, Measure, Study, check
from studies.records import RunRecord, config_key, full, short
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import nearest, unknown_key

LoadConfig = Callable[[str], ml_collections.ConfigDict]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the matrix.

    Attributes:
      arm, seed: which.
      config: the run's, without its folder; before its recipe is chosen, the study's.
      key: of the config; "" before its recipe is chosen.
      config_group: equal for runs that share their config, or will once its recipe is chosen.
    """

    arm: Arm
    seed: int
    config: ml_collections.ConfigDict
    key: str
    config_group: str


class Matrix:
    """The runs of a study, and what is known of them from records."""

    def __init__(self, study: Study, load_config: LoadConfig) -> None:
        """Check the declaration.

        Args:
          study: what is declared.
          load_config: "RECIPE:ARGUMENT" -> config, as of --config.

        Raises:
          UserError: what is wrong with the declaration.
        """
        check(study)
        self.study, self._load = study, load_config
        self._recipes: dict[str, ml_collections.ConfigDict] = {}
        self._runs: dict[tuple[Any, ...], Run] = {}

    def run(self, arm: Arm, seed: int, best: Arm | None = None) -> Run:
        """Return the run of an arm; `best` is the candidate whose recipe a tuned arm takes over, None while unknown."""
        identity = (arm.name, seed, best and best.name)
        if identity not in self._runs:
            config = self.config(arm, seed, best.changes if best else {})
            key = config_key(config.to_dict())
            waits = bool(arm.tuned and best is None)
            self._runs[identity] = Run(arm, seed, config, "" if waits else key, f"{arm.tuned if waits else ''}:{key}")
        return self._runs[identity]

    def config(self, arm: Arm, seed: int, tuned: Mapping[str, Any]) -> ml_collections.ConfigDict:
        """Make the config of a run; `tuned` are the changes of the candidate that was chosen.

        Raises:
          UserError: a key that does not exist, a value that is not allowed, or sets that the arm may not see.
        """
        if arm.recipe not in self._recipes:
            self._recipes[arm.recipe] = self._load(arm.recipe)
        config = self._recipes[arm.recipe].copy_and_resolve_references()
        validation = self.study.sets_of(arm)
        final = () if arm.section in ON_VALIDATION else tuple(self.study.tests)
        sets = {"eval.sets": tuple(map(full, validation)), "eval.final_sets": tuple(map(full, final)), "eval.every": 0}
        changes = {"eval.report": False, "seed": seed, **sets, **self.study.changes, **tuned, **arm.changes}
        try:
            for name, value in changes.items():
                _set(config, name, value)
            if arm.length != 1:
                config.steps, warmup = round(config.steps * arm.length), round(config.optim.warmup * arm.length)
                config.optim.warmup = warmup
            config.checkpoint.every, config.checkpoint.keep = max(config.steps // 4, 1), 1
            schema.resolve(config)
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from error
        during, final = set(short(config.eval.sets)), set(short(config.eval.final_sets))
        before_end = during | final if arm.section in ON_VALIDATION else during
        if others := before_end - set(validation):
            raise UserError(
                f"arm {arm.name!r} would be evaluated on {min(others)!r} before its end or to choose by it; only the "
                f"sets of `validation` are for that: {', '.join(validation)}."
            )
        return config


class Snapshot:
    """A matrix and the runs that are finished at one time.

    Attributes:
      study, records: what is declared, and {key: run} of what is finished.
      chosen: {objective: the candidate with the best recipe, all of its changes}, None while a candidate is missing.
      runs: all runs, in the order in which they are run.
    """

    def __init__(self, matrix: Matrix, records: Mapping[str, RunRecord]) -> None:
        self.study, self.records, self._matrix = matrix.study, records, matrix
        self.chosen: dict[str, Arm | None] = {}
        for section, measure in (("tuning", self.study.choose), ("factors", self.study.search)):
            chosen = {}
            for objective in dict.fromkeys(arm.objective for arm in self.study.of_section(section)):
                if objective and measure:
                    chosen[objective] = self._best(section, objective, measure)
            self.chosen |= chosen
        ordered = sorted(self.study.arms, key=lambda arm: SECTIONS.index(arm.section))
        best: dict[str, Arm | None] = {"": None, **self.chosen}
        # First seeds of all arms of a section before second ones: what is finished can be compared at any time.
        places = [(SECTIONS.index(arm.section), i, arm, seed) for arm in ordered for i, seed in enumerate(arm.seeds)]
        places.sort(key=lambda place: place[:2])
        self.runs = [matrix.run(arm, seed, best[arm.tuned]) for _, _, arm, seed in places]
        self._finished: dict[str, dict[int, RunRecord]] = {arm.name: {} for arm in ordered}
        for run in self.runs:
            if run.key in records:
                self._finished[run.arm.name][run.seed] = records[run.key]

    def _best(self, section: str, objective: str, measure: Measure) -> Arm | None:
        """The candidate with the best mean over seeds; the first of equals wins.

        A candidate with a run that diverged is not among the best.
        """
        best = None
        for arm in self.study.of_section(section):
            if arm.objective != objective:
                continue
            recipe = self.chosen[arm.tuned] if arm.tuned else None
            if arm.tuned and not recipe:
                return None
            of_arm = [self.records.get(self._matrix.run(arm, seed, recipe).key) for seed in arm.seeds]
            values = [record.value(measure.set, measure.metric) for record in of_arm if record]
            if None in of_arm:
                return None
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                mean = (1 if measure.higher else -1) * sum(known) / len(known)
                best = (mean, arm, recipe) if best is None or mean > best[0] else best
        if best is None:
            return None
        _, arm, recipe = best
        return dataclasses.replace(arm, changes={**(recipe.changes if recipe else {}), **arm.changes})

    def config_of(self, arm: str, seed: int) -> ml_collections.ConfigDict:
        """Return the config of one run, for starting it by other means than the study's command.

        Raises:
          UserError: no such run, or its recipe is not chosen yet.
        """
        arms = {run.arm.name: run.arm for run in self.runs}
        if arm not in arms:
            raise UserError(f"arm {arm!r} is unknown; did you mean {nearest(arm, arms)!r}?")
        run = next((run for run in self.runs if (run.arm.name, run.seed) == (arm, seed)), None)
        if run is None:
            raise UserError(f"arm {arm!r} has the seeds {', '.join(map(str, arms[arm].seeds))}, not {seed}.")
        if not run.key:
            raise UserError(
                f"arm {arm!r} takes over the best recipe of {run.arm.tuned}, and not all of its candidates are "
                "finished; run those first."
            )
        return run.config.copy_and_resolve_references()

    def finished(self, arm: str) -> dict[int, RunRecord]:
        """Return {seed: record} of the finished runs of an arm."""
        return self._finished[arm]

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return {seed: value} of an arm, as far as runs are finished and have one."""
        values = {seed: record.value(measure.set, measure.metric) for seed, record in self.finished(arm).items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def choice(self, name: str, *, without: int | None = None) -> str | None:
        """Return the arm that a name stands for: itself, or of a choice the best arm on validation.

        None while an arm of the choice has no run. An arm with a run that diverged is not chosen. Means are over the
        seeds that all other arms have, but for the seed that is left out by `without`.
        """
        if name not in self.study.choices:
            return name
        arms = [arm for arm in self.study.choices[name] if not any(r.error for r in self.finished(arm).values())]
        if not arms:
            return None
        of_arms = {arm: self.values(arm, self.study.choose) for arm in arms}
        seeds = [seed for seed in self.seeds(arms, self.study.choose) if seed != without]
        sign = 1 if self.study.choose.higher else -1
        return max(of_arms, key=lambda arm: sign * sum(of_arms[arm][seed] for seed in seeds)) if seeds else None

    def seeds(self, arms: Sequence[str], measure: Measure) -> list[int]:
        """Return the seeds for which all of the arms have a value."""
        return sorted(set.intersection(*(set(self.values(arm, measure)) for arm in arms)))

    def missing(self) -> list[Run]:
        """Return the runs that are not finished, those that wait for a recipe too."""
        return [run for run in self.runs if run.key not in self.records]

    def unused(self) -> list[RunRecord]:
        """Return records that belong to no arm of the declaration as it is now."""
        keys = {run.key for run in self.runs}
        return [record for key, record in self.records.items() if key not in keys]


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    """Set a dotted key; groups such as objective.terms are replaced."""
    *path, last = name.split(".")
    group: Any = config
    for i, part in enumerate([*path, last]):
        if not isinstance(group, ml_collections.ConfigDict) or part not in group:
            known = group if isinstance(group, ml_collections.ConfigDict) else ()
            raise UserError(f"{unknown_key('.'.join([*path, last][: i + 1]), known)}.")
        group = group if i == len(path) else group[part]
    try:
        group[last] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be {value!r}: {error}") from error


# --- how long runs take

_EVALUATION = 60.0  # seconds, before any is measured


def seconds_of(snapshot: Snapshot, run: Run) -> float:
    """Estimate how long a run takes by records of the same arm, else of the same objective and batch, in seconds."""
    config, known = run.config, [record for record in snapshot.records.values() if not record.error]
    kind = config.objective.name, config.data.batch
    groups = (
        [r for r in known if r.arm == run.arm.name],
        [r for r in known if (r.config["objective.name"], r.config["data.batch"]) == kind],
        known,
    )
    measured = ([v for r in group if (v := _per_pair(r)) is not None] for group in groups)
    speeds = next(filter(None, measured), [snapshot.study.seconds_per_pair])
    sets = len({*config.eval.sets, *config.eval.final_sets})
    spent = [(len(_sets(r)), r.seconds["evaluation"]) for r in known if r.seconds["evaluation"] is not None]
    same = [seconds for count, seconds in spent if count == sets] or [seconds for _, seconds in spent]
    evaluation = sum(same) / len(same) if same else _EVALUATION
    return config.steps * config.data.batch * sum(speeds) / len(speeds) + evaluation


def _sets(record: RunRecord) -> set[str]:
    return {*record.config["eval.sets"], *record.config["eval.final_sets"]}


def _per_pair(record: RunRecord) -> float | None:
    seconds = record.seconds["training"]
    return None if seconds is None else seconds / (record.config["steps"] * record.config["data.batch"])


def selected(snapshot: Snapshot, only: Collection[str]) -> list[Run]:
    """Return the runs of sections and arms named in `only`, without repetitions of one config; all for an empty one."""
    runs = [run for run in snapshot.runs if not only or {run.arm.section, run.arm.name} & set(only)]
    first = {run.config_group: run for run in reversed(runs)}
    return [run for run in runs if first[run.config_group] is run]


def overview(snapshot: Snapshot, only: Collection[str]) -> str:
    """Return what --dry-run prints: a line for each arm with finished and missing runs and the hours of the latter."""
    runs = selected(snapshot, only)
    width = max((len(run.arm.name) for run in runs), default=4)
    lines = [f"{'arm':<{width}}  {'section':<9}{'runs':>5}{'done':>6}{'hours left':>12}"]
    total = dict.fromkeys(SECTIONS, 0.0)
    for name in dict.fromkeys(run.arm.name for run in runs):
        of_arm = [run for run in runs if run.arm.name == name]
        arm = of_arm[0].arm
        left = [run for run in of_arm if run.key not in snapshot.records]
        hours = sum(seconds_of(snapshot, run) for run in left) / 3600
        total[arm.section] += hours
        waits = f"  waits for tuning of {arm.tuned}" if any(not run.key for run in left) else ""
        lines.append(
            f"{name:<{width}}  {arm.section:<9}{len(of_arm):>5}{len(of_arm) - len(left):>6}{hours:>12.2f}{waits}"
        )
    lines += ["", *(f"{section:<9}{hours:>8.1f} hours" for section, hours in total.items() if hours)]
    return "\n".join([*lines, f"{'all':<9}{sum(total.values()):>8.1f} hours, one run at a time"])
