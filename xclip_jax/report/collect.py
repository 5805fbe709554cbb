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
from xclip_jax.core.errors import UserError, first_line
from xclip_jax.core.run_folder import RunReader
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
      config: the run's config, with defaults for keys newer than the run.
      objective: made from the config.
      environment: versions, devices, commit and command.
      training: metrics of the logged steps, in order.
      evaluations: (step, results) of each step with an evaluation during training, including the last one.
      results: the newest of each set, by the run or by `xclip-jax evaluate`, with the per-example values that
        results.json or evaluation.json has for them.
      steps_of: {(family, set): step} of the results that are not by the last step of a complete run.
      sources: one fingerprint per source of data.sources.
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
    steps_of: dict[Key, int]
    sources: list[dict[str, Any]]
    bad: int
    began: datetime.datetime
    ended: datetime.datetime | None

    @property
    def steps(self) -> int:
        """The last logged step; of a complete run the last one, which may have been skipped."""
        if self.complete:
            return self.config.steps
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def complete(self) -> bool:
        """Whether the last evaluation has been made."""
        return self.ended is not None

    def step_of(self, result: Result) -> int | None:
        """Return the step of one of the results; None for the last one of a complete run."""
        return self.steps_of.get((result.family, result.set))

    def before(self, result: Result) -> Result | None:
        """Return the result of equal name before the first step, if the run has gone on from it."""
        step, first = self.evaluations[0] if len(self.evaluations) > 1 else (-1, [])
        return next((x for x in first if step == 0 and x.name == result.name), None)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on a page.

    Attributes:
      name: name on the page.
      color: number of its colour.
      record: contents of its directory.
      examples: predictions of its model; empty without a checkpoint.
      parameters: number of the model's parameters, if known.
      step: step of the checkpoint that made the predictions, if there are any.
    """

    name: str
    color: int
    record: Record
    examples: Examples
    parameters: int | None = None
    step: int | None = None


def read(path: str | epath.Path) -> Record:
    """Read the run directory `path`; raises `UserError` if it is none, or for a damaged file in it."""
    run = RunReader(path)
    content = run.read_config()
    if content is None:
        fault = "is not a run directory: it has no config.json" if run.path.exists() else "does not exist"
        raise UserError(f"{str(path)!r} {fault}; name the folder of a run.")
    try:
        return _read(run, content)
    except UserError:
        raise
    except Exception as error:  # JSON of any other form
        raise UserError(
            f"a file of run {str(path)!r} has another form than a run writes ({first_line(error)}); restore it."
        ) from error


def _read(run: RunReader, content: Mapping[str, Any]) -> Record:
    with imports.named_by(run.config_file):
        config = schema.resolve(schema.complete(content["config"]))
    training = [row for row in run.read_metrics() if "loss" in row]
    final = run.read_results()
    logged = [(int(line["step"]), results.from_json(line["records"])) for line in run.read_evaluations()]
    last = [(config.steps, results.from_json(final["records"]))] if final else []
    # A diverged evaluation leaves the one before as the newest.
    evaluations = by_step(
        (step, [x for x in measured if math.isfinite(x.value)]) for step, measured in [*logged, *last]
    )
    entries, items_of = results.read(run.evaluation_file) if run.evaluation_file.exists() else ([], {})
    made = [(measured, results.read_items(run.results_file).get(results.LAST, {})) for _, measured in last]
    made += [(results.read_entries([entry]), items_of.get(entry["items"], {})) for entry in entries]
    entries = results.current_entries(entries, config.eval)
    shown = results.latest(entries)[0] if entries else []
    evaluated = [(int(shown[-1]["step"]), results.read_entries(shown))] if shown else []
    known, steps_of = newest([*last, *evaluations, *evaluated])
    if final:
        steps_of = {key: step for key, step in steps_of.items() if step != config.steps}
    # Of results of equal name and value: a file may have another value than the newest.
    items = {(x.name, round(x.value, 4)): own[x.name] for measured, own in made for x in measured if x.name in own}
    return Record(
        folder=run.path,
        config=config,
        objective=make_objective(config.objective),
        environment=(final or {}).get("environment") or content.get("environment") or {},
        training=training,
        evaluations=evaluations,
        results=[dataclasses.replace(x, items=items.get((x.name, round(x.value, 4)))) for x in known],
        steps_of=steps_of,
        sources=run.read_sources() or [],
        bad=int(training[-1].get("data/bad", 0)) if training else 0,
        began=datetime.datetime.fromisoformat(content["started"]),
        ended=datetime.datetime.fromisoformat(final["ended"]) if final else None,
    )


# Evaluations: joined by step, the newest of each set, and the names of sets on a page.


def by_step(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return one evaluation per step: results.jsonl has the last evaluation set by set."""
    joined: dict[int, dict[str, Result]] = {}
    for step, measured in evaluations:
        joined.setdefault(step, {}).update({result.name: result for result in measured})
    return [(step, list(joined[step].values())) for step in sorted(joined)]


def newest(evaluations: Iterable[Evaluation]) -> tuple[list[Result], dict[Key, int]]:
    """Return the results of each set at the newest step that has it, and {(family, set): that step}.

    Args:
      evaluations: evaluations of any order; among equal steps the first one counts.
    """
    newest_of: dict[Key, tuple[int, list[Result]]] = {}
    for step, measured in sorted(evaluations, key=lambda evaluation: evaluation[0], reverse=True):
        sets: dict[Key, list[Result]] = {}
        for result in measured:
            sets.setdefault((result.family, result.set), []).append(result)
        # Metrics that are not numbers are absent: a set without its main metric replaces nothing.
        newest_of |= {key: (step, own) for key, own in sets.items() if key not in newest_of and tables.rows(own)}
    known = [result for _, measured in newest_of.values() for result in measured]
    return known, {key: step for key, (step, _) in newest_of.items()}


def labels(rows: Iterable[tables.Row]) -> dict[Key, str]:
    """Return {(family, name) of each row: its short name}, with the family's title if two rows share a name."""
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
    measured = [each for record in records for each in (record.results, *(own for _, own in record.evaluations))]
    return [row for each in measured for row in tables.rows(each)]


# Intervals of results, and tests whether results are above chance.


class Judgement(NamedTuple):
    """A result's interval in the result's unit, NaN without one, and the verdict against chance.

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
    low = high = math.nan
    items = result.items
    n = 0 if result.dependent else result.n
    if items is not None:
        n = items.trials()
    resampled = items is not None and not n
    if resampled:
        low, high = bootstrap(items, samples=_SAMPLES)
    elif result.unit == "%" and n and math.isfinite(result.value):
        right = min(max(round(n * result.value / 100), 0), n)
        exact = scipy.stats.binomtest(right, n).proportion_ci(LEVEL)
        low = 100 * exact.low
        high = 100 * exact.high
    verdict = ""
    if result.unit == "%" and result.chance is not None and math.isfinite(low):
        verdict = UNDECIDED
        if low > result.chance:
            verdict = ABOVE
        elif high < result.chance:
            verdict = BELOW
    return Judgement(low, high, verdict, resampled)


def verdicts(known: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Return {(set and task, metric): verdict} of the first metric of each row of the tables, if it has one."""
    first = {(row.name, row.shown[0][0].metric): row.shown[0][1] for row in tables.rows(known)}
    return {key: judge(result).verdict for key, result in first.items() if judge(result).verdict}


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
        term = record.objective.terms[name]
        first_step = record.config.alarm_step
        judged = [row for row in rows if row["step"] >= first_step]
        by_name = [{text.partition(":")[0]: text for text in term.alarms(row)} for row in judged]
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
