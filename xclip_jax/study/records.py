"""Run files: what a finished run of a study leaves in the repository, one small JSON file each."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from xclip_jax.config import schema
from xclip_jax.errors import UserError
from xclip_jax.evaluators.provenance import VALIDATION
from xclip_jax.evaluators.result import Result, from_json, to_json
from xclip_jax.run_folder import CLOCKS, RunFolder
from xclip_jax.storage import strict_json, write_whole
from xclip_jax.study.declaration import ON_VALIDATION

# Keys that do not change what is learned or measured, only where and how fast; all images of a study are opaque.
FREE_KEYS = (
    "run", "checkpoint.", "data.background", "data.buffer", "data.cache", "data.dir", "data.threads", "data.workers",
    "eval.batch", "eval.every", "eval.report", "log.", "loss.", "mesh.",
)  # fmt: skip
CURVE_POINTS = 20
# Of the logged metrics, those that a curve keeps, as far as a run has them.
_CURVE = (
    "loss", "clip/loss", "clip/ln_b", "siglip/loss", "siglip/ln_b", "nclip/loss", "nclip/mutual_information_img",
    "nclip/mutual_information_txt", "nclip/clusters_img", "grad_norm",
)  # fmt: skip
_FIELDS = ("arm", "section", "seed", "config", "commit", "environment", "seconds", "final", "curve", "results")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run file contains.

    Attributes:
      arm, section, seed: what the run was started as.
      config: all keys, flat.
      commit: of the code, one after the other where it changed, joined by ", "; ends in "-dirty" where it was changed.
      environment: versions, devices, and "workers", runs at the same time, None where unknown.
      seconds: "training", without compilation and pauses, and "evaluation"; None where unknown.
      final: metrics of the last step.
      curve: {metric: values at about `CURVE_POINTS` steps}, with "step".
      results: of the last evaluation, without those of parts of a set.
      error: why the run has no results: its loss was not finite. Else "".
    """

    arm: str
    section: str
    seed: int
    config: Mapping[str, Any]
    commit: str
    environment: Mapping[str, Any]
    seconds: Mapping[str, float | None]
    final: Mapping[str, float]
    curve: Mapping[str, Sequence[float | None]]
    results: Sequence[Result]
    error: str = ""

    @property
    def key(self) -> str:
        """Identity of what was run, see `config_key`."""
        return config_key(nest(self.config))

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.arm}-s{self.seed}-{self.key[:8]}.json"

    def value(self, set_name: str, metric: str) -> float | None:
        """Return a result, the set's headline for metric ""; with the set "" a metric of the last step."""
        if not set_name:
            return self.final.get(metric)
        of_set = [result for result in self.results if result.set == set_name]
        return next((r.value for r in of_set if (r.key == metric if metric else r.headline)), None)

    def similarities(self, set_name: str) -> dict[str, str]:
        """Return {similarity, "" the model's own: key of the set's headline by it}."""
        of_set = [result for result in self.results if result.set == set_name and not result.group]
        headlines = [(result.task, result.metric) for result in of_set if result.headline]
        return {r.score: r.key for r in of_set if headlines and (r.task, r.metric) == headlines[0]}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} -> {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        group = nested
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    return nested


def config_key(config: Mapping[str, Any]) -> str:
    """Hash of a nested config without `FREE_KEYS`.

    Keys that are newer than the config have their defaults, so that a run file is recognised for as long as the run
    would come out the same.
    """
    flat = schema.flatten(schema.complete(config).to_dict())
    decisive = {name: value for name, value in flat.items() if not name.startswith(FREE_KEYS)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read(path: pathlib.Path) -> RunRecord:
    """Return the content of a run file.

    Raises:
      UserError: a damaged file.
    """
    remedy = "restore it, or delete it to run it again"
    try:
        content = json.loads(path.read_text())
        results = from_json(content["results"])
        record = RunRecord(
            **{name: content[name] for name in _FIELDS if name != "results"},
            results=results,
            error=content.get("error", ""),
        )
        same_name = path.stem.endswith(f"-{content['key'][:8]}")
        consistent = record.config["seed"] == record.seed and bool(record.key)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run file ({type(error).__name__}: {error}); {remedy}.") from error
    if not (same_name and consistent):
        raise UserError(f"{path} has a key or a seed that is not that of its name or its config; {remedy}.")
    return record


def read_all(folder: pathlib.Path) -> dict[str, RunRecord]:
    """Return {key: run} of all run files in a folder, in the order of their names.

    Raises:
      UserError: a damaged file, or two files of one run.
    """
    records: dict[str, RunRecord] = {}
    paths: dict[str, pathlib.Path] = {}
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        if record.key in records:
            raise UserError(f"{paths[record.key]} and {path} are of one run, with one config and seed; delete one.")
        records[record.key], paths[record.key] = record, path
    return records


def write(folder: pathlib.Path, record: RunRecord) -> pathlib.Path:
    """Write a run file and return its path.

    Raises:
      UserError: the file exists: a finished run is not evaluated again.
    """
    path = folder / record.file_name
    if path.exists():
        raise UserError(f"{path} exists: this run is finished; delete the file to run it again.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(epath.Path(path), render(record))
    return path


def render(record: RunRecord) -> str:
    """Return the text of a run file: a line for each config key, metric and result."""
    content: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS} | {
        "key": record.key,
        "results": to_json(record.results),
    }
    if record.error:
        content["error"] = record.error
    lines = []
    for name, value in sorted(content.items()):
        if name in ("config", "curve", "final"):
            rows = [f"  {strict_json(key)}: {strict_json(item)}" for key, item in sorted(value.items())]
            text = "{\n" + ",\n".join(rows) + "\n }" if rows else "{}"
        elif name == "results":
            text = "[\n" + ",\n".join(f"  {strict_json(item)}" for item in value) + "\n ]" if value else "[]"
        else:
            text = strict_json(value, sort_keys=True)
        lines.append(f" {strict_json(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value: float) -> float | None:
    """Six digits; None for what is not finite, as JSON has it."""
    return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None


def thinned(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Return {metric: values} of about `CURVE_POINTS` lines of metrics, evenly spaced, with the first and the last."""
    if not lines:
        return {}
    count = min(CURVE_POINTS, len(lines))
    chosen = [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]
    names = ["step", *(name for name in _CURVE if name in lines[-1])]
    return {name: [rounded(line.get(name, float("nan"))) for line in chosen] for name in names}


def collect(
    folder: str | pathlib.Path, *, arm: str, section: str, commit: str, workers: int | None, error: str
) -> RunRecord:
    """Make the record of a run from its folder; `error` is why a run stopped that has no results.

    Raises:
      UserError: a run that is not finished; results of a set that is not for validation, where the section is one of
        `ON_VALIDATION`.
    """
    run = RunFolder(str(folder))
    saved, config = run.read_results(), run.read_config()
    lines = [line for line in run.read_metrics() if "loss" in line]
    if config is None or (saved is None and not error) or (saved or {}).get("failed"):
        raise UserError(f"{folder} is not a finished run; run the same command to go on.")
    results = from_json((saved or {}).get("records", ()))
    others = sorted({r.set for r in results if r.protocol.role != VALIDATION})
    if section in ON_VALIDATION and others:
        raise UserError(f"arm {arm!r} is {section} and was evaluated on {', '.join(others)}, not for validation.")
    environment = dict((saved or config)["environment"])
    for name in ("command", "commit"):
        environment.pop(name, None)
    flat, last = schema.flatten(config["config"]), lines[-1] if lines else {}
    speeds = [line["samples_per_second"] for line in lines if line.get("samples_per_second")]
    training = flat["steps"] * flat["data.batch"] / speeds[-1] if speeds else None
    evaluation = (saved or {}).get("seconds")
    return RunRecord(
        arm=arm,
        section=section,
        seed=flat["seed"],
        config={name: value for name, value in flat.items() if name != "run"},
        commit=commit,
        environment=environment | {"workers": workers},
        seconds={
            "training": None if training is None else round(training, 1),
            "evaluation": None if evaluation is None else round(evaluation, 1),
        },
        final={name: v for name, x in last.items() if name not in ("step", *CLOCKS) and (v := rounded(x)) is not None},
        curve=thinned(lines),
        results=[dataclasses.replace(r, value=rounded(r.value)) for r in results if not r.group or r.headline],
        error=error,
    )
