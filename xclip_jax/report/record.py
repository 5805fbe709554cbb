"""Reads a run directory, complete or in progress."""

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import imports
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder, not_found
from xclip_jax.evaluators import results
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.objectives import Objective, make_objective
from xclip_jax.report.evaluations import Evaluation, Key, by_step, newest

Row = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """Contents of a run directory; empty where a file does not exist yet.

    Attributes:
      folder: the run directory.
      config: of the run, with defaults for keys that are newer than the run.
      objective: made from the config.
      environment: versions, devices, commit and command.
      training: metrics of the logged steps, in order.
      evaluations: (step, results) of each step with an evaluation during training, the last one among them.
      results: of the last evaluation, then those of other sets that `xclip-jax evaluate` has measured at the same
        step; before there is one the newest of each set, during training or by `xclip-jax evaluate`. With per-example
        values where evaluation.json has them of the same number.
      steps_of: {(family, set): step} of the results, where they are the newest of each set.
      sources: fingerprint of each of config's data.sources.
      bad: number of samples in the ledger of bad samples.
      began, ended: start of the run, and the time when results.json was written, UTC.
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
        """The last logged step."""
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def complete(self) -> bool:
        """Whether the last evaluation has been made."""
        return self.ended is not None

    def step_of(self, result: Result) -> int | None:
        """Step of one of the results; None for the run's last one."""
        return self.steps_of.get((result.family, result.set))

    @property
    def items(self) -> str:
        """Name of the items of a batch."""
        return "labelled items" if self.objective.labelled else "image-text pairs"


def read(path: str | epath.Path) -> Record:
    """Read the run directory `path`.

    Raises:
      UserError: no run directory, or a damaged file in it.
    """
    run = RunFolder(path)
    content = run.read_config()
    if content is None:
        if not run.path.exists():
            raise UserError(not_found(path, "name the folder of a run."))
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
    rows, final = run.read_metrics(), run.read_results() or {}
    known, step = _results(run, final, config)
    evaluations = by_step((int(line["step"]), _finite(line["records"])) for line in run.read_evaluations())
    steps_of: dict[Key, int] = {}
    if not final or step != config.steps:
        known, steps_of = newest([(step, known), *evaluations])
    facts = final.get("environment") or content.get("environment") or {}
    if not isinstance(facts.get("versions", {}), dict) or not isinstance(facts.get("commit", ""), str):
        raise TypeError("environment has versions or a commit of another type")
    return Record(
        folder=run.path,
        config=config,
        objective=make_objective(config.objective),
        environment=facts,
        training=[row for row in rows if "loss" in row],
        evaluations=evaluations,
        results=_with_items(known, run.evaluation_file),
        steps_of=steps_of,
        sources=run.read_sources() or [],
        bad=len(run.read_bad_samples()),
        began=datetime.datetime.fromisoformat(content["started"]),
        ended=datetime.datetime.fromtimestamp(run.results_file.stat().mtime, datetime.UTC) if final else None,
    )


def _finite(records: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Return the results that are numbers; a diverged evaluation leaves the one before as the newest."""
    return [result for result in results.from_json(records) if math.isfinite(result.value)]


def _results(run: RunFolder, final: Mapping[str, Any], config: Config) -> tuple[list[Result], int]:
    """Return the results of the last evaluation, `final`, and those of evaluation.json beside them; and their step.

    It is the last one, or where the last evaluation has no results the newest of evaluation.json.
    """
    steps = config.steps
    known, entries = results.from_json(final["records"]) if final else [], []
    if run.evaluation_file.exists():
        # A damaged file costs a run that has results of its own no more than what it would add.
        with contextlib.suppress(UserError) if known else contextlib.nullcontext():
            entries = results.of_config(results.read(run.evaluation_file)[0], config)
    if not entries:
        return known, steps
    shown, sets = results.latest(entries)[0], {(result.family, result.set) for result in known}
    others = results.of_entries([entry for entry in shown if not known or entry["step"] == steps])
    step = steps if known else int(shown[-1]["step"])
    return [*known, *(result for result in others if (result.family, result.set) not in sets)], step


def _with_items(known: Sequence[Result], file: epath.Path) -> list[Result]:
    """Return results with the per-example values that a results file has of a result of equal name and value."""
    items: dict[tuple[str, float], PerExample] = {}
    if file.exists():
        with contextlib.suppress(UserError):  # without them intervals are binomial
            entries, items_of = results.read(file)
            for entry in entries:
                own = items_of.get(entry["items"], {})
                items |= {
                    (r.name, round(r.value, 4)): own[r.name] for r in results.of_entries([entry]) if r.name in own
                }
    return [dataclasses.replace(result, items=items.get((result.name, round(result.value, 4)))) for result in known]
