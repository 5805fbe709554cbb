"""Reads a run directory, complete or in progress."""

import contextlib
import dataclasses
import datetime
import json
from typing import Any

from etils import epath

from xclip_jax.errors import UserError
from xclip_jax.evaluators import flat_names, results
from xclip_jax.evaluators.result import Result
from xclip_jax.objectives import upgrade

Row = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as its files describe it; empty where a file is not there yet.

    Attributes:
      folder: of the run.
      config: all keys, nested.
      environment: versions, devices, commit and command.
      training: metrics of the logged steps, in order.
      evaluations: (step, results) of the evaluations on the way.
      results: of the last evaluation, or of `xclip_jax.evaluate` where there is no last one.
      sources: what data.json says of each of config's data.sources.
      bad: how many samples the ledger names.
      began, ended: when config.json and results.json were written, UTC.
    """

    folder: epath.Path
    config: dict[str, Any]
    environment: dict[str, Any]
    training: list[Row]
    evaluations: list[tuple[int, list[Result]]]
    results: list[Result]
    sources: list[dict[str, Any]]
    bad: int
    began: datetime.datetime
    ended: datetime.datetime | None

    @property
    def steps(self) -> int:
        """How many steps were made, as far as they are logged."""
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def complete(self) -> bool:
        """Whether the last evaluation has been made."""
        return self.ended is not None


def read(run: str | epath.Path) -> Record:
    """The record of the run in folder `run`; `UserError` where it holds no readable config.json."""
    folder = epath.Path(run)
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{str(run)!r} is no run's folder: it has no config.json; name the folder of a run.")
    try:
        written = json.loads(path.read_text())
        config, environment = written["config"], written["environment"]
        config["objective"] = upgrade(config["objective"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name the folder of another run.") from error
    rows = _lines(folder / "metrics.jsonl")
    final = _json(folder / "results.json")
    known = results.of_run(final) or results.of_entries(_json(folder / "evaluation.json").get("results", []))
    return Record(
        folder=folder,
        config=config,
        environment=final.get("environment", environment),
        training=[row for row in rows if "loss" in row],
        evaluations=[(int(row["step"]), flat_names.read(row, known)) for row in rows if "loss" not in row],
        results=known,
        sources=_json(folder / "data.json") or [],
        bad=len(_lines(folder / "bad_samples.jsonl")),
        # config.json is written again when a run resumes.
        began=datetime.datetime.fromisoformat(written["started"]) if "started" in written else _written(path),
        ended=_written(folder / "results.json") if final else None,
    )


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); restore or delete it.") from error


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without values that were not finite; its last line may be half written."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                rows.append({key: value for key, value in content.items() if value is not None})
    return rows


def _written(path: epath.Path) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(path.stat().mtime, datetime.UTC)
