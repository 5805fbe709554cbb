"""Checks and writes the folder of a training run."""

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.core.console import log0
from xclip_jax.core.errors import UserError, check_writable, redact
from xclip_jax.core.run_folder import RunReader, lock
from xclip_jax.core.storage import is_remote, write_json, write_whole
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import AUTO, WHOLE, LengthGroups
from xclip_jax.evaluators.results import LAST, Result, flat, items, items_file, to_json, write_items
from xclip_jax.interop import hub
from xclip_jax.objectives import TERMS

# Digests of `data.records.reading_digest` in fingerprints, and their descriptions.
OUTCOMES = {
    "data.holdout": "what data.holdout holds out",
    "data.spread_duplicate_captions": "what data.spread_duplicate_captions spreads",
}
_CONTENT = ("samples", "classes")  # of a fingerprint, next to its hash
_SHOWN = 5  # differences that an error lists


class RunWriter(RunReader):
    """Checks a folder before a run, claims it during the run, and writes its small files."""

    def check(self, config: Config) -> None:
        """Raise `UserError`, without writing anything, unless a run of `config` can start or resume in this folder."""
        for path in () if is_remote(str(self.path)) else (self.path, self.checkpoints):  # may be on different disks
            check_writable(f"--config.run={str(self.path)!r}", path)
        saved = self.read_config()
        latest = self.latest_step()
        fault = ""
        if saved is None and latest is not None:
            fault = (
                "has checkpoints and no config.json, so there is no record of their config; restore the file, or use a "
                "different --config.run."
            )
        elif saved is not None and latest is None:
            step = self.last_logged_step()
            # The second checkpoint is started when the first is on disk.
            if self.results_file.exists() or 0 < 2 * saved["config"]["checkpoint"]["every"] < step:
                fault = (
                    f"has metrics up to step {step} and no checkpoint; restore {self.checkpoints}, or delete the "
                    "folder to train from step 0."
                )
        elif saved is not None:
            before = schema.flatten(saved["config"])
            after = schema.flatten(schema.to_dict(config))
            free = schema.keys_where(resume="free")
            terms = {*config.objective.terms, *saved["config"].get("objective", {}).get("terms", {})}
            unused = tuple(f"objective.{name}." for name in TERMS if name not in terms)
            differing = [
                f"{key} ({before.get(key)!r} in config.json, {after.get(key)!r} now)"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key) and key not in free and not key.startswith(unused)
            ]
            if differing:
                rest = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
                fault = (
                    f"contains a run with a different config: {', '.join(differing[:_SHOWN])}{rest}. Use a different "
                    "--config.run, delete the folder, or give these keys the values of its config.json."
                )
        if fault:
            raise UserError(f"{self.path} {fault}")

    def read_config(self) -> dict[str, Any] | None:
        """Return the content of config.json, with defaults for keys that it lacks."""
        content = super().read_config()
        return content and content | {"config": schema.complete(content["config"]).to_dict()}

    def _resumed(self) -> dict[str, Any] | None:
        """Return the content of config.json if the run has a checkpoint, else None."""
        return None if self.latest_step() is None else self.read_config()

    def completed(self, config: Config) -> dict[str, float] | None:
        """Return the results of a run that is trained and evaluated as `config` asks, else None."""
        record = self.read_results() if self.latest_step() == config.steps else None
        if record is None or record.get("failed"):
            return None
        saved = schema.flatten(schema.complete(record.get("config", {})).to_dict())
        current = schema.flatten(schema.to_dict(config))
        keys = schema.keys_where(evaluation="model") + schema.keys_where(evaluation="sets")
        return record["results"] if all(saved[key] == current[key] for key in keys) else None

    def moved_sources(self, config: Config) -> bool:
        """Whether the run was started with other names in `data.sources`."""
        saved = self.read_config()
        return saved is not None and tuple(saved["config"]["data"]["sources"]) != redact(config.data.sources)

    def tokenizer(self, config: Config) -> str:
        """Return data.tokenizer or, in a run with a checkpoint, the run's copy of the same tokenizer file."""
        name = config.data.tokenizer
        saved = self._resumed()
        if saved is None:
            return name  # `claimed` writes the copy again
        was = saved["config"]["data"]["tokenizer"]
        copy = self.tokenizer_file
        known = name
        if {name, was} & set(tokenizer.NAMES):
            same = name == was
        else:
            given = epath.Path(name).expanduser()
            same = not (given.exists() and copy.exists()) or given.read_bytes() == copy.read_bytes()
            if copy.exists():
                known = str(copy)
        if not same:
            raise UserError(
                f"data.tokenizer={name!r} differs from {was!r}, which the run was started with; use a different "
                "--config.run."
            )
        return known

    def length_groups(self, text_rows: tuple[int, int]) -> LengthGroups | None:
        """Return the run's length groups; None without a checkpoint, or if `Experiment.text_rows` differ."""
        content = self._resumed()
        if content is None or content.get("text_rows") != list(text_rows):
            return None
        return LengthGroups.parse(content["length_groups"])

    def check_sources(self, config: Config, fingerprints: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` unless a resumed run reads the same data as before, at any address."""
        saved = self.read_sources() if self._resumed() else None
        if saved is None:
            return
        if len(saved) != len(fingerprints):
            raise UserError(
                f"data.sources has {len(fingerprints)} sources and had {len(saved)} when {self.path} was started; "
                "restore them, or use a different --config.run."
            )
        for number, (old, new) in enumerate(zip(saved, fingerprints, strict=True)):
            source = f"source {number}, {config.data.sources[number]!r}"
            same = old["hash"] == new["hash"]
            for key, outcome in OUTCOMES.items():  # unreadable records also change the number of samples
                if same and key in old and key in new and old[key]["digest"] != new[key]["digest"]:
                    raise UserError(
                        f"{source}: {outcome} differs from {self.data_file}, and with it the order of all samples: "
                        f"{new[key]['unreadable']:,} of the records cannot be read now, {old[key]['unreadable']:,} "
                        "could not be read then; see that all files can be read, and start again, or use a different "
                        "--config.run."
                    )
            if not same or any(old.get(key, new.get(key)) != new.get(key) for key in _CONTENT):
                raise UserError(
                    f"{source}, has changed since {self.data_file} was written: {old['samples']:,} samples then, "
                    f"{new['samples']:,} now, or other files. Restore it, or use a different --config.run."
                )

    @contextlib.contextmanager
    def claimed(
        self,
        config: Config,
        fingerprints: Sequence[Mapping[str, Any]],
        groups: LengthGroups = WHOLE,
        text_rows: tuple[int, int] | None = None,
        init_step: int = 0,
    ) -> Iterator[None]:
        """Lock the folder, write config.json, data.json and the tokenizer, and delete old results.

        Args:
          config: the resolved config of the run.
          fingerprints: one per source.
          groups: length groups of its texts.
          text_rows: `Experiment.text_rows` for these groups.
          init_step: step of the initial weights in their run, else 0.
        """
        if jax.process_index() != 0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path, blocking=False, file=self.lock_file):
            self.check(config)  # another run may have come and gone
            for file in (self.results_file, items_file(self.results_file)):  # launchers wait for the first
                file.unlink(missing_ok=True)
            self._write_config(config, groups, text_rows, init_step)
            write_json(self.data_file, list(fingerprints))
            starts = self.latest_step() is None
            named = config.data.tokenizer in tokenizer.NAMES
            if starts and named:
                self.tokenizer_file.unlink(missing_ok=True)  # left by a start that failed
            elif not named and (starts or not self.tokenizer_file.exists()):
                write_whole(self.tokenizer_file, tokenizer.read_file(config.data.tokenizer))
            yield

    def write_results(self, config: Config, results: Sequence[Result], **details: Any) -> None:
        """Write results.json: results as numbers and records, config, environment and `details`."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = {"config": schema.to_dict(config), "environment": environment.capture(), "ended": now}
        values = {"results": flat(results), "records": to_json(results)}
        per_item = items(results)
        if per_item:
            write_items(self.results_file, {LAST: per_item})
        write_json(self.results_file, values | facts | details)

    def last_logged_step(self) -> int:
        """Return the last step of metrics.jsonl, 0 for none."""
        return max((int(line["step"]) for line in self.read_metrics()), default=0)

    def _write_config(
        self, config: Config, groups: LengthGroups, text_rows: tuple[int, int] | None, init_step: int
    ) -> None:
        saved = self.read_config()
        current = schema.to_dict(config)
        before = schema.flatten(saved["config"]) if saved else {}
        after = schema.flatten(current)
        facts = environment.capture()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        chosen = {"length_groups": str(groups), "text_rows": text_rows and list(text_rows)}
        if saved is None or self.latest_step() is None:
            judging = schema.keys_where(evaluation="model") + schema.keys_where(evaluation="sets")
            ignored = {*schema.keys_where(resume="free")} - {*judging, "data.tokenizer"}
            differs = any(before.get(key) != after.get(key) for key in {*before, *after} - ignored)
            if saved is not None and (differs or saved.get("init_step", 0) != init_step):
                # Evaluations before the first step belong to other weights or sets.
                self.metrics_file.unlink(missing_ok=True)
                self.results_log_file.unlink(missing_ok=True)
            content: dict[str, Any] = {"config": current, "environment": facts, "started": now, **chosen}
            commit = hub.locate(config.init.weights).commit
            if commit:
                content["init_commit"] = commit
            if init_step:
                content["init_step"] = init_step
            write_json(self.config_file, content)
            return
        changed = {key: [before.get(key), value] for key, value in after.items() if before.get(key) != value}
        last = (saved.get("starts") or [saved])[-1].get("environment", {})
        for name, version in facts["versions"].items():
            old = last.get("versions", {}).get(name, version)
            if old != version:
                log0(f"WARNING: the run goes on with {name} {version}; so far it was {old}, and numbers may differ")
        # data.length_groups=full is for this start only.
        renew = saved.get("text_rows") != chosen["text_rows"] and config.data.length_groups == AUTO
        if changed or renew or {**last, "command": ""} != {**facts, "command": ""}:
            start = {"step": self.latest_step(), "time": now, "changed": changed, "environment": facts}
            saved |= {"config": current, "starts": [*saved.get("starts", []), start]}
            write_json(self.config_file, saved | chosen if renew else saved)
