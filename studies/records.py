"""Records of finished runs, one line each in a study's runs.jsonl."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import unflatten_dict

from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import strict_json
from xclip_jax.evaluators.results import VALIDATION, Result, from_json, to_json

# Keys that change neither training nor results, only place and speed; the images of studies are opaque and upright.
FREE_KEYS = (
    "run", "checkpoint.", "data.cache", "data.decoding", "data.dir", "data.threads",
    "eval.batch", "eval.every", "eval.report", "log.", "loss.", "mesh.",
)  # fmt: skip
# Prefixes of sets and sources in a config, and their short forms in records and declarations, so that moving code does
# not change a run's identity.
SHORT_NAMES = {
    "studies.photographs.sets:PhotographSets/": "photographs/",
    "studies.photographs.corpus:PhotographSplits:": "photographs:",
    "studies.icons.sets:IconSets/": "icons/",
    "studies.icons.sources:IconSplits:": "icons:",
    "studies.duel.terms:SecondHead": "second_head",  # its former place
    "studies.photographs.terms:SecondHead": "second_head",
}
# Former config keys. All runs had their default, or the value that the objective has without the key; runs on icons
# have the stem "hmlp", which only the code of their commit knows.
REMOVED = (
    "checkpoint.keep_every", "data.background", "data.buffer", "data.caption_noise", "data.exif_rotation",
    "data.read_timeout", "data.subset", "data.tags", "data.tags_append_prob", "data.tags_key", "data.tags_only_prob",
    "data.workers", "ema.on", "ema.schedule", "eval.before", "finetune.lora.kernels", "finetune.lora.targets",
    "log.collapse_warmup_steps", "log.expected_epochs", "log.profile", "log.project", "log.stall_warning", "loss.impl",
    "model.bias_init", "model.cluster_head.last_norm", "model.img.act", "model.img.eps", "model.img.patch_bias",
    "model.img.patch_dropout", "model.img.pre_norm", "model.img.stem", "model.project_bias", "model.project_img",
    "model.scale_init", "model.txt.act", "model.txt.eps", "model.txt.scan", "objective.classify.head_std",
    "objective.clip.distill", "objective.clip.distill_ramp", "objective.clip.distill_tau", "objective.clip.reverse",
    "objective.nclip.balance", "objective.nclip.center_momentum", "objective.nclip.target_tau", "optim.lr_start",
    "optim.max_grad_norm_ratio", "optim.max_skipped_steps", "optim.mu_dtype", "optim.rewind",
)  # fmt: skip
# Instead of `data.tags`, which only the icons had.
_ICON_CAPTIONS = "studies.icons.sources:add_category:category"
# Former names of config keys.
RENAMED = {
    "data.image_key": "data.image_column", "data.text_keys": "data.text_columns", "eval.final_sets": "eval.sets_at_end",
    "init.frozen": "init.freeze", "log.to": "log.trackers", "model.img.scan": "model.scan",
    "objective.clip.q": "objective.clip.gce_q",
}  # fmt: skip
_FIELDS = ("arm", "seed", "config", "commit", "environment", "results")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A line of runs.jsonl."""

    arm: str
    seed: int
    config: Mapping[str, Any]  # all keys, flat
    commit: str  # of the code; several, joined by ", ", if it changed meanwhile; "-dirty" marks uncommitted code
    environment: Mapping[str, Any]  # versions, devices, and "workers", the number of simultaneous runs
    results: Sequence[Result]  # of the last evaluation, except on parts of a set
    error: str = ""  # the message of a run that diverged and so has no results
    evaluations: Sequence[Mapping[str, float]] = ()  # headlines over the run, {"step": step, "SET KEY": value}

    @property
    def key(self) -> str:
        """Identity of the run, see `config_key`."""
        return config_key(unflatten_dict(dict(self.config), sep="."))

    @property
    def name(self) -> str:
        """Arm, seed and the beginning of the key, by which records are sorted."""
        return f"{self.arm}-s{self.seed}-{self.key[:8]}"

    def value(self, set_name: str, metric: str) -> float | None:
        """Return a result of a set, for metric "" its headline; None if it is missing or not finite."""
        of_set = [result for result in self.results if result.set == set_name and math.isfinite(result.value)]
        return next((r.value for r in of_set if (r.key == metric if metric else r.headline)), None)

    def mean(self, set_name: str, metrics: Sequence[str]) -> float | None:
        """Return the mean of several results of a set, or None if one is missing or not finite."""
        values = [self.value(set_name, metric) for metric in metrics]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None


def short(value: Any) -> Any:
    """Return a name, or a list of names, shortened by `SHORT_NAMES`; other values of a config unchanged."""
    return _renamed(value, SHORT_NAMES)


def full(value: Any) -> Any:
    """Return the full names of sets and sources, the reverse of `short`."""
    return _renamed(value, {name: prefix for prefix, name in SHORT_NAMES.items()})


def _renamed(value: Any, prefixes: Mapping[str, str]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(item, prefixes) for item in value)
    if isinstance(value, str):
        for prefix, replacement in prefixes.items():
            if value.startswith(prefix):
                return replacement + value.removeprefix(prefix)
    return value


def config_key(config: Mapping[str, Any]) -> str:
    """Return the hash of a nested config without `FREE_KEYS`, with defaults of newer keys and short names.

    A run is thus recognised as long as a new one would be equal.
    """
    flat = schema.flatten(schema.complete(config).to_dict())
    decisive = {name: short(value) for name, value in flat.items() if not name.startswith(FREE_KEYS)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read(line: str) -> RunRecord:
    """Return the record in a line of runs.jsonl.

    Raises:
      ValueError, KeyError, TypeError, AttributeError, UserError: a damaged line.
    """
    content = json.loads(line)
    removed = (*REMOVED, "ema.momentum") if "ema.on" in content["config"] else REMOVED  # 0.996, which targets have
    kept = {name: value for name, value in content["config"].items() if name not in removed}
    if content["config"].get("data.tags"):
        kept["data.caption_transform"] = _ICON_CAPTIONS
    content["config"] = {RENAMED.get(name, name): value for name, value in kept.items()}
    fields: dict[str, Any] = {name: content[name] for name in _FIELDS} | {"results": from_json(content["results"])}
    record = RunRecord(**fields, error=content.get("error", ""), evaluations=content.get("evaluations", ()))
    if record.config["seed"] != record.seed or not record.key:
        raise ValueError("the seed differs from the config's")
    return record


def read_all(path: pathlib.Path) -> dict[str, RunRecord]:
    """Return {key: run} of a runs.jsonl, ordered by the runs' names; none if the file does not exist.

    Raises:
      UserError: a damaged line, or two lines of one run.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    records: dict[str, RunRecord] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = read(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is not the record of a run ({type(error).__name__}: {error}); restore it, or "
                "delete it to run it again."
            ) from error
        if record.key in records:
            raise UserError(f"{path}, line {number}, repeats {record.name}, with one config and seed; delete one.")
        records[record.key] = record
    return dict(sorted(records.items(), key=lambda item: item[1].name))


def write(path: pathlib.Path, record: RunRecord) -> str:
    """Append a record to a runs.jsonl, which simultaneous commands may share, and return its name.

    Raises:
      UserError: the run is already recorded; a finished run is not evaluated again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if record.key in read_all(path):
            raise UserError(f"{path} has {record.name}: this run is finished; delete its line to run it again.")
        file.write(render(record).encode())
        file.flush()
        os.fsync(file.fileno())
    return record.name


def render(record: RunRecord) -> str:
    """Return the line of a record."""
    content: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS} | {"results": to_json(record.results)}
    if record.error:
        content["error"] = record.error
    if record.evaluations:
        content["evaluations"] = record.evaluations
    return f"{strict_json(content, sort_keys=True)}\n"


def rounded(value: float) -> float:
    """Return a number with six digits."""
    return float(f"{value:.6g}")


def collect(folder: str | pathlib.Path, *, arm: str, tested: bool, commit: str, workers: int, error: str) -> RunRecord:
    """Make the record of a run from its folder; `error` is the message of a run that diverged.

    Raises:
      UserError: an unfinished run; results on a test set although the arm is not `tested`.
    """
    run = RunReader(str(folder))
    saved = run.read_results()
    config = run.read_config()
    if config is None or (saved is None and not error) or (saved or {}).get("failed"):
        raise UserError(f"{folder} is not a finished run; run the same command to go on.")
    results = from_json((saved or {}).get("records", ()))
    others = sorted({r.set for r in results if r.protocol.role != VALIDATION})
    if others and not tested:
        raise UserError(f"arm {arm!r} is for choices and was evaluated on {', '.join(others)}, not for validation.")
    environment = dict((saved or config)["environment"])
    for name in ("command", "commit"):
        environment.pop(name, None)
    flat = schema.flatten(config["config"])
    return RunRecord(
        arm=arm,
        seed=flat["seed"],
        config={name: short(value) for name, value in flat.items() if name != "run"},
        commit=commit,
        environment=environment | {"workers": workers},
        results=[
            dataclasses.replace(r, set=short(r.set), value=rounded(r.value))
            for r in results
            if not r.group or r.headline
        ],
        error=error,
        evaluations=_evaluations(run, flat["eval.every"]),
    )


def _evaluations(run: RunReader, every: int) -> list[dict[str, float]]:
    """Return the headlines of a run's evaluations; none if it evaluates only at its end."""
    lines = []
    for line in run.read_evaluations() if every else ():
        values = {f"{short(r.set)} {r.key}": rounded(r.value) for r in from_json(line["records"]) if r.headline}
        lines.append({"step": line["step"]} | {name: value for name, value in values.items() if math.isfinite(value)})
    return lines
