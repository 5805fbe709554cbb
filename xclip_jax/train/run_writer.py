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
from xclip_jax.core.errors import UserError
from xclip_jax.core.outputs import check_folder, check_writable
from xclip_jax.core.run_folder import RunReader, lock
from xclip_jax.core.storage import as_path, is_remote, write_json, write_whole
from xclip_jax.data import tokenizer
from xclip_jax.data.length_groups import AUTO, WHOLE, LengthGroups
from xclip_jax.evaluators.results import LAST, Result, flat, items, items_file, to_json, write_items
from xclip_jax.train.checkpoint_files import check_store
from xclip_jax.train.weights import Origin

# Keys of a fingerprint with a digest by `data.records.reading_digest`.
OUTCOMES = ("data.holdout", "data.spread_duplicate_captions")
_SHOWN = 5  # differences that an error lists
_RANDOM = Origin()  # weights drawn at random


class RunWriter(RunReader):
    """Checks a folder before a run, claims it during the run, and writes its small files."""

    def __init__(self, path: str | epath.Path) -> None:
        check_store(path)
        super().__init__(path)

    def check(self, config: Config) -> None:
        """Raise `UserError`, without writing anything, unless a run of `config` can start or resume in this folder."""
        if not is_remote(str(self.path)):
            check_writable("--config.run", self.checkpoints)  # may be on another disk
        saved = self.read_config()
        latest = self.latest_step()
        fault = ""
        if saved is None and latest is not None:
            fault = "has checkpoints and no config.json; restore it"
        elif saved is not None and latest is None:
            step = self.last_logged_step()
            every = saved["config"]["checkpoint"]["every"]
            skipped = {line["step"] for line in self.read_skipped_steps()}  # these are not saved
            saves = [due for due in range(every, step, every) if due not in skipped] if every else []
            # The second checkpoint is started when the first is on disk. An earlier start may have saved less often.
            if self.results_file.exists() or (len(saves) > 1 and step != saved.get("unsaved_step")):
                fault = f"has metrics up to step {step} and no checkpoint; restore {self.checkpoints}"
        elif saved is not None:
            before = schema.flatten(saved["config"])
            after = schema.flatten(schema.to_dict(config))
            free = schema.keys_where(resume="free")
            differing = [
                f"{key} ({before.get(key)!r} in config.json, {after.get(key)!r} now)"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key) and key not in free
            ]
            if differing:
                listed = ", ".join(differing[:_SHOWN])
                fault = f"has a run whose config differs in {len(differing)} keys, such as {listed}; restore them"
        if fault:
            raise UserError(f"{self.path} {fault}, or use a different --config.run.")
        check_folder("--config.run", self.path, lambda: saved is not None)

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
        # A run of other sources is prepared and evaluated again, which compares their content.
        keys = {*schema.keys_where(evaluation="model"), *schema.keys_where(evaluation="sets"), "data.sources"}
        return record["results"] if all(saved[key] == current[key] for key in keys) else None

    def tokenizer(self, config: Config) -> str:
        """Return data.tokenizer or, in a run with a checkpoint, the run's copy of the same tokenizer file."""
        name = config.data.tokenizer
        saved = self._resumed()
        if saved is None:
            return name  # `claimed` writes the copy again
        was = saved["config"]["data"]["tokenizer"]
        if name == was and name in tokenizer.NAMES:
            return name
        if not {name, was} & set(tokenizer.NAMES):
            given = epath.Path(name).expanduser()
            if not given.exists() or given.read_bytes() == self.tokenizer_file.read_bytes():
                return str(self.tokenizer_file)
        raise UserError(f"data.tokenizer={name!r} differs from {was!r} in {self.config_file}; use that one.")

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
        for number, name in enumerate(config.data.sources):
            old = saved[number] if number < len(saved) else {}
            new = fingerprints[number]
            same = len(saved) == len(fingerprints) and old.get("data.drop") == new.get("data.drop")
            for key in ("hash", "samples", "classes"):
                same &= old.get(key, new.get(key)) == new.get(key)
            for key in {*OUTCOMES} & old.keys() & new.keys():
                same &= old[key]["digest"] == new[key]["digest"]
            if not same:
                raise UserError(
                    f"source {number}, {name!r}, has changed since {self.data_file} was written: other sources, files, "
                    "or readable records; restore them, or use a different --config.run."
                )

    @contextlib.contextmanager
    def claimed(
        self,
        config: Config,
        fingerprints: Sequence[Mapping[str, Any]],
        groups: LengthGroups = WHOLE,
        text_rows: tuple[int, int] | None = None,
        origin: Origin = _RANDOM,
    ) -> Iterator[None]:
        """Lock the folder, write config.json, data.json and the tokenizer, and delete old results.

        `text_rows` are `Experiment.text_rows` for the length `groups`, `origin` belongs to the initial weights.
        """
        if jax.process_index() != 0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path, blocking=False, file=self.lock_file):
            self.check(config)  # another run may have come and gone
            for file in (self.results_file, items_file(self.results_file)):  # launchers wait for the first
                file.unlink(missing_ok=True)
            self._write_config(config, groups, text_rows, origin)
            write_json(self.data_file, list(fingerprints))
            if config.eval.class_names:  # perhaps the run's copy itself
                write_whole(self.class_names_file, as_path(config.eval.class_names).read_bytes())
            else:
                self.class_names_file.unlink(missing_ok=True)
            if self.latest_step() is None:
                self.tokenizer_file.unlink(missing_ok=True)  # left by a start that failed
                if config.data.tokenizer not in tokenizer.NAMES:
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
        self, config: Config, groups: LengthGroups, text_rows: tuple[int, int] | None, origin: Origin
    ) -> None:
        saved = self._resumed()
        current = schema.to_dict(config)
        facts = environment.capture()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        chosen = {"length_groups": str(groups), "text_rows": text_rows and list(text_rows)}
        if saved is None:
            begin = {"init_commit": origin.commit, "init_step": origin.step, "unsaved_step": self.last_logged_step()}
            content = {"config": current, "environment": facts, "started": now} | chosen
            write_json(self.config_file, content | {key: value for key, value in begin.items() if value})
            return
        before = schema.flatten(saved["config"])
        after = schema.flatten(current)
        changed = {key: [before.get(key), value] for key, value in after.items() if before.get(key) != value}
        start = {"step": self.latest_step(), "time": now, "changed": changed, "environment": facts}
        saved |= {"config": current, "starts": [*saved.get("starts", []), start]}
        # Length groups named in a config are for this start only.
        renew = saved.get("text_rows") != chosen["text_rows"] and config.data.length_groups == AUTO
        write_json(self.config_file, saved | chosen if renew else saved)
