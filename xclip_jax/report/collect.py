"""Reads metrics, results with intervals and verdicts, and warnings from a run's folder."""

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
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import unreadable_as
from xclip_jax.evaluators import results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import bootstrap
from xclip_jax.objectives import Health, Objective, make_objective
from xclip_jax.report.examples import Examples

LEVEL = 0.95  # of intervals
ABOVE, BELOW, UNDECIDED = "above chance", "below chance", "not distinguishable from chance"
_SAMPLES = 1000  # each takes milliseconds for average precision

Row = dict[str, float]
Key = tuple[str, str]  # family and set
Evaluation = tuple[int, list[Result]]  # step and results


@dataclasses.dataclass(frozen=True)
class Record:
    """Contents of a run directory, with empty fields for missing files."""

    folder: epath.Path
    config: Config  # with defaults for keys newer than the run
    objective: Objective
    environment: dict[str, Any]  # versions, devices, commit and command
    training: list[Row]  # metrics of the logged steps, in order
    evaluations: list[Evaluation]  # by the run
    results: list[Result]  # newest of each set, by the run or `xclip-jax evaluate`, with stored per-example values
    steps_of: dict[Key, int]  # of the results, except those of a complete run's last step
    sources: list[dict[str, Any]]  # one fingerprint per source of data.sources
    began: datetime.datetime  # UTC
    ended: datetime.datetime | None  # end of the last evaluation, UTC

    @property
    def steps(self) -> int:
        """The last step, or before the run is complete the last logged one."""
        if self.complete:
            return self.config.steps
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def complete(self) -> bool:
        """Whether the last evaluation has been made."""
        return self.ended is not None

    def step_of(self, result: Result) -> int | None:
        """Return the step of a result, or None for the last step of a complete run."""
        return self.steps_of.get((result.family, result.set))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on a page."""

    name: str
    color: int  # number of a colour
    record: Record
    examples: Examples  # empty without a checkpoint
    parameters: int | None = None  # number of model parameters, if known
    step: int | None = None  # of the predictions' checkpoint


def read(path: str | epath.Path) -> Record:
    """Read a run directory; raises `UserError` if it is not one or contains a damaged file."""
    run = RunReader(path)
    content = run.read_config()
    if content is None:
        fault = "is not a run directory: it has no config.json" if run.path.exists() else "does not exist"
        raise UserError(f"{str(path)!r} {fault}; name the folder of a run.")
    with unreadable_as(f"a file of run {str(path)!r} is damaged; restore it"):
        return _read(run, content)


def _read(run: RunReader, content: Mapping[str, Any]) -> Record:
    with imports.named_by(run.config_file):
        config = schema.resolve(schema.complete(content["config"]))
    training = [row for row in run.read_metrics() if "loss" in row]
    final = run.read_results()
    logged = [(int(line["step"]), results.from_json(line["records"])) for line in run.read_evaluations()]
    last = [(config.steps, results.from_json(final["records"]))] if final else []
    joined: dict[int, dict[str, Result]] = {}  # results.jsonl stores the last evaluation set by set
    for step, measured in [*logged, *last]:
        joined.setdefault(step, {}).update({x.name: x for x in measured if math.isfinite(x.value)})
    evaluations = [(step, list(joined[step].values())) for step in sorted(joined)]
    entries, items_of = results.read(run.evaluation_file) if run.evaluation_file.exists() else ([], {})
    made = [(measured, results.read_items(run.results_file).get(results.LAST, {})) for _, measured in last]
    made += [(results.read_entries([entry]), items_of.get(entry["items"], {})) for entry in entries]
    settings = results.settings(config.eval)
    entries = [entry for entry in entries if entry.get("eval", settings) == settings]
    shown = results.latest(entries)[0] if entries else []
    evaluated = [(int(shown[-1]["step"]), results.read_entries(shown))] if shown else []
    known, steps_of = newest([*last, *evaluations, *evaluated])
    if final:
        steps_of = {key: step for key, step in steps_of.items() if step != config.steps}
    # The files may contain older values, so the values must agree.
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
        began=datetime.datetime.fromisoformat(content["started"]),
        ended=datetime.datetime.fromisoformat(final["ended"]) if final else None,
    )


def newest(evaluations: Iterable[Evaluation]) -> tuple[list[Result], dict[Key, int]]:
    """Return the newest results of each set and {(family, set): their step}; of equal steps the first counts."""
    newest_of: dict[Key, tuple[int, list[Result]]] = {}
    for step, measured in sorted(evaluations, key=lambda evaluation: evaluation[0], reverse=True):
        sets: dict[Key, list[Result]] = {}
        for result in measured:
            sets.setdefault((result.family, result.set), []).append(result)
        # Undefined metrics are absent, and a set without its main metric has no rows.
        newest_of |= {key: (step, own) for key, own in sets.items() if key not in newest_of and tables.rows(own)}
    known = [result for _, measured in newest_of.values() for result in measured]
    return known, {key: step for key, (step, _) in newest_of.items()}


def short_set_names(runs: Sequence[Run]) -> dict[str, str]:
    """Return {set: short name} of all results of `runs`."""
    measured = [own for run in runs for own in (run.record.results, *(x for _, x in run.record.evaluations))]
    return tables.shorten(row.name for own in measured for row in tables.rows(own))


class Judgement(NamedTuple):
    """A result's interval of level `LEVEL`, NaN without one, and its verdict against chance.

    The verdict is `ABOVE`, `BELOW`, `UNDECIDED`, or "" without an interval or a known chance level.
    """

    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        """Return the interval in words."""
        return f"{self.low:.1f} to {self.high:.1f}" if math.isfinite(self.low) else ""


@functools.lru_cache(256)
def judge(result: Result) -> Judgement:
    """Return the interval of a result and its verdict.

    A percentage of independent, equally weighted items has Clopper and Pearson's binomial interval. Other per-example
    values are resampled, unless all are right or all wrong: resamples could not differ, so these have the binomial
    interval of their effective number, see `PerExample.trials`. Dependent items without values have no interval.
    """
    low = high = math.nan
    items = result.items
    n = 0 if result.dependent else result.n
    if items is not None:
        n = items.trials()
    if items is not None and not n:
        low, high = bootstrap(items, samples=_SAMPLES)
    elif result.unit == "%" and n and math.isfinite(result.value):
        right = min(max(round(n * result.value / 100), 0), n)
        low, high = (100 * end for end in scipy.stats.binomtest(right, n).proportion_ci(LEVEL))
    verdict = ""
    if result.unit == "%" and result.chance is not None and math.isfinite(low):
        verdict = UNDECIDED
        if low > result.chance:
            verdict = ABOVE
        elif high < result.chance:
            verdict = BELOW
    return Judgement(low, high, verdict)


def verdicts(known: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Return {(set and task, metric): verdict} for the first metric of each table row, if it has one."""
    first = {(row.name, row.shown[0][0].metric): row.shown[0][1] for row in tables.rows(known)}
    return {key: judge(result).verdict for key, result in first.items() if judge(result).verdict}


class Warnings(NamedTuple):
    """The health of one term at the last step, and {name: warning} at each of the `steps` from `first_step` on."""

    health: Health
    first_step: int
    steps: list[int]
    warnings: list[dict[str, str]]

    @classmethod
    def collect(cls, record: Record, name: str) -> "Warnings":
        """Judge term `name` at the logged steps with all of its metrics."""
        objective = record.objective
        term = objective.terms[name]
        rows = [objective.metrics_of(name, row) | {"step": row["step"]} for row in record.training]
        names = set().union(*rows)
        trains = len(names) > 1 and objective.weights[name]  # with weight 0 its checks would fail
        rows = [row for row in rows if trains and row.keys() == names]
        first_step = record.config.alarm_step
        judged = [row for row in rows if row["step"] >= first_step]
        by_name = [{text.partition(":")[0]: text for text in term.alarms(row)} for row in judged]
        health = term.health(rows[-1]) if rows else Health()
        return cls(health, first_step, [int(row["step"]) for row in judged], by_name)

    def last(self, name: str) -> str:
        """Return the warning at the last step, or ""."""
        return self.warnings[-1].get(name, "") if self.warnings else ""

    def history(self, name: str) -> str:
        """Return a sentence on the steps with a warning."""
        if not self.steps:
            return f"Checked from step {self.first_step:,} on."
        steps = [step for step, warnings in zip(self.steps, self.warnings, strict=True) if name in warnings]
        where = f"of {len(self.steps):,} logged steps from step {self.first_step:,} on"
        return f"Warning at {len(steps):,} {where}, last at {steps[-1]:,}." if steps else f"No warning at any {where}."
