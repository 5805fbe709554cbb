"""Collects what a run's folder says about the run: metrics, results with intervals and verdicts, and warnings."""

import collections
import dataclasses
import datetime
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import scipy
from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import imports
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.evaluators import results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import bootstrap
from xclip_jax.objectives import Objective, make_objective
from xclip_jax.report.examples import Examples

LEVEL = 0.95  # of intervals
ABOVE, BELOW, UNDECIDED = "above chance", "below chance", "not distinguishable from chance"
_SAMPLES = 1000  # a resample of average precision takes milliseconds

Row = dict[str, float]
Key = tuple[str, str]  # family and set
Evaluation = tuple[int, list[Result]]  # step and results


@dataclasses.dataclass(frozen=True)
class Record:
    """Contents of a run directory; empty where a file does not exist yet.

    Attributes:
      folder: the run directory.
      config: of the run, with defaults for keys that are newer than the run.
      objective: made from the config.
      environment: versions, devices, commit and command.
      training: metrics of the logged steps, in order.
      evaluations: (step, results) of each step with an evaluation during training, including the last one.
      results: the newest of each set, by the run or by `xclip-jax evaluate`. With per-example values where
        results.json or evaluation.json has them of the same number.
      mixes: (share of tuned weights, results) of what `xclip-jax evaluate --mix` evaluated last.
      steps_of: {(family, set): step} of the results, where it is not the last step of a complete run.
      sources: fingerprint of each of config's data.sources.
      bad: number of samples in the ledger of bad samples.
      began, ended: start of the run, and the end of its last evaluation, UTC.
    """

    folder: epath.Path
    config: Config
    objective: Objective
    environment: dict[str, Any]
    training: list[Row]
    evaluations: list[Evaluation]
    results: list[Result]
    mixes: list[tuple[float, list[Result]]]
    steps_of: dict[Key, int]
    sources: list[dict[str, Any]]
    bad: int
    began: datetime.datetime
    ended: datetime.datetime | None

    @property
    def steps(self) -> int:
        """The last logged step; of a complete run the last one, which may have been skipped."""
        return self.config.steps if self.complete else int(self.training[-1]["step"]) if self.training else 0

    @property
    def complete(self) -> bool:
        """Whether the last evaluation has been made."""
        return self.ended is not None

    def step_of(self, result: Result) -> int | None:
        """Return the step of one of the results; None for the last one of a complete run."""
        return self.steps_of.get((result.family, result.set))

    def before(self, result: Result) -> Result | None:
        """Return the result of equal name before the first step, where the run has one and goes on from it."""
        step, first = self.evaluations[0] if len(self.evaluations) > 1 else (-1, [])
        return next((x for x in first if step == 0 and x.name == result.name), None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on a page.

    Attributes:
      name: on the page.
      color: number of its colour.
      record: contents of its directory.
      examples: predictions of its model; empty without a checkpoint.
      parameters: number of the model's parameters, if known.
      step: of the checkpoint that made the predictions, if there are any.
    """

    name: str
    color: int
    record: Record
    examples: Examples
    parameters: int | None = None
    step: int | None = None


def read(path: str | epath.Path) -> Record:
    """Read the run directory `path`.

    Raises:
      UserError: no run directory, or a damaged file in it.
    """
    run = RunFolder(path)
    content = run.read_config()
    if content is None:
        if not run.path.exists():
            raise UserError(f"{str(path)!r} does not exist; name the folder of a run.")
        raise UserError(f"{str(path)!r} is not a run directory: it has no config.json; pass a run directory.")
    try:
        return _read(run, content)
    except UserError:
        raise
    except Exception as error:  # JSON of any other form
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"a file of run {str(path)!r} has another form than a run writes ({reason}); restore it."
        ) from error


def _read(run: RunFolder, content: Mapping[str, Any]) -> Record:
    with imports.named_by(run.config_file):
        config = schema.resolve(schema.complete(content["config"]))
    training = [row for row in run.read_metrics() if "loss" in row]
    final = run.read_results()
    logged = [(int(line["step"]), results.from_json(line["records"])) for line in run.read_evaluations()]
    last = [(config.steps, results.from_json(final["records"]))] if final else []
    # A diverged evaluation leaves the one before as the newest.
    evaluations = by_step((step, [x for x in own if math.isfinite(x.value)]) for step, own in [*logged, *last])
    evaluated, items_of = results.read(run.evaluation_file) if run.evaluation_file.exists() else ([], {})
    made = [(own, results.read_items(run.results_file).get(results.LAST, {})) for _, own in last]
    made += [(results.of_entries([x]), items_of.get(x["items"], {})) for x in evaluated if "mix" not in x]
    known, steps_of = newest([*last, *evaluations, *_evaluated(results.of_group(evaluated, config.eval))])
    if final:
        steps_of = {key: step for key, step in steps_of.items() if step != config.steps}
    return Record(
        folder=run.path,
        config=config,
        objective=make_objective(config.objective),
        environment=(final or {}).get("environment") or content.get("environment") or {},
        training=training,
        evaluations=evaluations,
        results=_with_items(known, made),
        mixes=results.by_mix(evaluated),
        steps_of=steps_of,
        sources=run.read_sources() or [],
        bad=int(training[-1].get("data/bad", 0)) if training else 0,
        began=datetime.datetime.fromisoformat(content["started"]),
        ended=datetime.datetime.fromisoformat(final["ended"]) if final else None,
    )


def _evaluated(entries: Sequence[results.Entry]) -> list[Evaluation]:
    """Return the newest results of entries of evaluation.json with their step, or none."""
    shown = results.latest(entries)[0] if entries else []
    return [(int(shown[-1]["step"]), results.of_entries(shown))] if shown else []


def _with_items(known: Sequence[Result], made: Sequence[tuple[list[Result], Mapping[str, Any]]]) -> list[Result]:
    """Return results with the per-example values that `made` has of a result of equal name and value.

    `made` has results as the run's files have them, each list with {name: per-example values}.
    """
    items = {(r.name, round(r.value, 4)): own[r.name] for of_set, own in made for r in of_set if r.name in own}
    return [dataclasses.replace(result, items=items.get((result.name, round(result.value, 4)))) for result in known]


# Evaluations: joined by step, the newest of each set, and the names of sets on a page.


def by_step(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return one evaluation for each step: results.jsonl has the last evaluation set by set."""
    joined: dict[int, dict[str, Result]] = {}
    for step, of_step in evaluations:
        joined.setdefault(step, {}).update({result.name: result for result in of_step})
    return [(step, list(joined[step].values())) for step in sorted(joined)]


def newest(evaluations: Iterable[Evaluation]) -> tuple[list[Result], dict[Key, int]]:
    """Return the results of each set at the newest step that has it, and {(family, set): that step}.

    Args:
      evaluations: of equal steps the first one counts.
    """
    of_sets: dict[Key, tuple[int, list[Result]]] = {}
    for step, of_step in sorted(evaluations, key=lambda evaluation: evaluation[0], reverse=True):
        sets: dict[Key, list[Result]] = {}
        for result in of_step:
            sets.setdefault((result.family, result.set), []).append(result)
        # Metrics that are not numbers are absent: a set without its main metric replaces nothing.
        of_sets |= {key: (step, own) for key, own in sets.items() if key not in of_sets and tables.rows(own)}
    return [result for _, own in of_sets.values() for result in own], {key: step for key, (step, _) in of_sets.items()}


def labels(rows: Iterable[tables.Row]) -> dict[Key, str]:
    """Return {(family, name) of each row: its short name}, with the family's title where two rows have one name."""
    keys = list(dict.fromkeys((row.family, row.name) for row in rows))
    short = tables.shorten(name for _, name in keys)
    counts = collections.Counter(short[name] for _, name in keys)
    return {
        (family, name): f"{short[name]} ({tables.title(family)})" if counts[short[name]] > 1 else short[name]
        for family, name in keys
    }


def rows_of(runs: Sequence[Run]) -> list[tables.Row]:
    """Return the rows of all sets that runs have results of."""
    records = [run.record for run in runs]
    measured = [x for each in records for x in (each.results, *(own for _, own in (*each.evaluations, *each.mixes)))]
    return [row for results in measured for row in tables.rows(results)]


# Intervals of results, and tests whether results are above chance.


class Judgement(NamedTuple):
    """A result's interval in its own unit, NaN where it has none, and the verdict against chance.

    Attributes:
      low, high: ends of the interval of level `LEVEL`.
      verdict: `ABOVE`, `BELOW`, `UNDECIDED`, or "" for a number without an interval or a known chance level.
      resampled: whether the interval is a bootstrap of per-example values, not a binomial one.
    """

    low: float
    high: float
    verdict: str
    resampled: bool

    def __str__(self) -> str:
        """The interval in words."""
        return f"{self.low:.1f} to {self.high:.1f}" if math.isfinite(self.low) else ""


@functools.lru_cache(256)
def judge(result: Result) -> Judgement:
    """Return the interval of a result and its verdict.

    A share of items has Clopper and Pearson's binomial interval, which assumes independent items of equal weight.
    Per-example values with unequal weights, groups or another statistic than a mean of zeros and ones are resampled.
    Resamples of values that are all right or all wrong cannot differ: these have the binomial interval of their
    effective number, see `PerExample.trials`. Without per-example values dependent items have no interval.
    """
    low, high, items = math.nan, math.nan, result.items
    n = (0 if result.dependent else result.n) if items is None else items.trials()
    if items is not None and not n:
        low, high = bootstrap(items, samples=_SAMPLES)
    elif result.unit == "%" and n and math.isfinite(result.value):
        right = min(max(round(n * result.value / 100), 0), n)
        exact = scipy.stats.binomtest(right, n).proportion_ci(LEVEL)
        low, high = 100 * exact.low, 100 * exact.high
    verdict = ""
    if result.unit == "%" and result.chance is not None and math.isfinite(low):
        verdict = ABOVE if low > result.chance else BELOW if high < result.chance else UNDECIDED
    return Judgement(low, high, verdict, resampled=items is not None and not n)


def verdicts(known: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Return {(set and task, metric): verdict} of the first metric of each row of the tables, where it has one."""
    first = {(row.name, row.shown[0][0].metric): row.shown[0][1] for row in tables.rows(known)}
    return {key: verdict for key, result in first.items() if (verdict := judge(result).verdict)}


# Failures that the terms of an objective warn of.


def complete_rows(objective: Objective, term: str, rows: Sequence[Row]) -> list[Row]:
    """Return the metrics of a term, without prefix, and "step", of the rows that have them all."""
    own = [objective.metrics_of(term, row) | {"step": row["step"]} for row in rows]
    names = set().union(*own)
    return [row for row in own if row.keys() == names] if len(names) > 1 else []


class Warnings(NamedTuple):
    """Warnings of one term at the logged steps from `first_step` on: {name: warning} of each step in `steps`."""

    first_step: int
    steps: list[int]
    warnings: list[dict[str, str]]

    @classmethod
    def collect(cls, record: Record, name: str, rows: Sequence[Row]) -> "Warnings":
        """Collect the warnings of the term `name` in `complete_rows`."""
        term, first_step = record.objective.terms[name], record.config.alarm_step
        judged = [row for row in rows if row["step"] >= first_step]
        by_name = [{text.partition(":")[0]: text for text in term.report.alarms(row)} for row in judged]
        return cls(first_step, [int(row["step"]) for row in judged], by_name)

    @property
    def names(self) -> list[str]:
        """Names of all failures that were warned of."""
        return list(dict.fromkeys(name for warnings in self.warnings for name in warnings))

    def last(self, name: str) -> str:
        """Return the warning at the last step, or ""."""
        return self.warnings[-1].get(name, "") if self.warnings else ""

    def history(self, name: str) -> str:
        """Return a sentence on the steps with this warning."""
        if not self.steps:
            return f"Checked from step {self.first_step:,} on."
        steps = [step for step, warnings in zip(self.steps, self.warnings, strict=True) if name in warnings]
        where = f"of {len(self.steps):,} logged steps from step {self.first_step:,} on"
        return f"Warning at {len(steps):,} {where}, last at {steps[-1]:,}." if steps else f"No warning at any {where}."
