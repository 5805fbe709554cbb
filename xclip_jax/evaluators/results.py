"""Results file of `xclip_jax.evaluate`: one JSON file, evaluation.json, to which later commands add.

    checkpoint, step, profile, changes      of "results"
    results                                 entries of the newest step that was evaluated, and of the model and profile
                                            that were evaluated last at that step: what tables and reports show
    other_results                           entries of other steps, models, profiles and checkpoints, oldest first
    suite, config, environment, seconds     of the last command that wrote the file

An entry is one set's result: "set", "metric", "value", "n", "metrics" (all of them), "records" (the same with unit,
chance level and evaluator), the provenance of the set ("split_hash", "protocol", "templates", ...), and its own
"checkpoint", "step", "profile" and "changes". "fingerprint" identifies the model, see `train.weights.fingerprint`:
weights may be replaced at the same path, and a run's keys in "eval" may change at the same step. "commit" is the commit
of the Hub that was read. A new entry replaces one with the same values of `KEY`; all others stay.

FILE.items.npz beside it has the per-example values of an entry's metrics, under "statistic:part:id:metric"; "id" is the
entry's "items", and the metric is quoted as in a URL.
"""

import io
import json
import math
import shlex
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from xclip_jax import file_lock
from xclip_jax.commands import command
from xclip_jax.config.schema import Config
from xclip_jax.console import format_bytes
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.evaluators import flat_names
from xclip_jax.evaluators.provenance import describe, digest
from xclip_jax.evaluators.result import Result, from_json, to_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.storage import write_json, write_whole

Entry = dict[str, Any]
ItemsOf = dict[str, dict[str, PerExample]]  # of each entry, by its "items"

KEY = ("set", "checkpoint", "step", "profile", "changes", "fingerprint")
_VIEW = KEY[1:]
# Bytes of the per-example values of an item, in some dozens of metrics or a thousand classes; and of all items.
_ITEM_BYTES, _MOST_BYTES = 1 << 16, 1 << 30
# Keys of a run's group `eval` that change what is evaluated at one step.
_EVAL_KEYS = ("ema", "resize", "resize_size", "interpolation")


def read(path: epath.Path) -> tuple[list[Entry], ItemsOf]:
    """Return all entries of a results file, oldest first and those of "results" last, and their items.

    Raises:
      UserError: a file that is missing or damaged.
    """
    if not path.exists():
        run = shlex.quote(str(path.parent)) if path.name == "evaluation.json" else "RUN"
        raise UserError(f"{path} does not exist; make it with {command('evaluate')} --checkpoint {run} --suite NAME.")
    try:
        record = json.loads(path.read_text())
        # Older files have these keys once, not in each entry.
        defaults = {key: record.get(key, default) for key, default in zip(_VIEW, ("", 0, "", {}, ""), strict=True)}
        entries = [defaults | entry for entry in (*record.get("other_results", ()), *record["results"])]
        # JSON has no NaN: it is null.
        nan = {"value": math.nan}
        entries = [entry | nan if entry["value"] is None else entry for entry in entries]
        _ = [(entry["set"], entry["name"], entry["metric"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a file of results ({error}); delete it, and evaluate again with --checkpoint."
        ) from error
    return entries, _read_items(path, entries)


def make_folder(path: epath.Path) -> None:
    """Make the folder of a results file that will be written; `UserError` where the file cannot be written."""
    if path.is_dir():
        raise UserError(f"--output {str(path)!r} is a folder; name a file in it.")
    if jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {str(path)!r}: the folder cannot be made ({error}).") from error


def make_entry(name: str, evaluator: str, results: Sequence[Result], preprocessing: Preprocessing) -> Entry:
    """Return the entry of a set: its provenance, the headline as "value", all metrics by their keys, and the records.

    Args:
      name: of the set.
      evaluator: `Evaluator.name`.
      results: of the set; one of them is the headline.
      preprocessing: of the model's images.
    """
    headline = next(result for result in results if result.headline)
    entry: Entry = dict(describe(headline.protocol))
    if "preprocessing" in entry:
        entry["preprocessing"] += f", {preprocessing.size} px, {preprocessing.normalization}"
    entry |= {"set": name, "name": evaluator, "metric": headline.key, "value": headline.value, "n": headline.n}
    return entry | {"metrics": {result.key: result.value for result in results}, "records": to_json(results)}


def settings(config: Config) -> dict[str, Any]:
    """Return what an entry's "eval" is for the model of a run of `config`."""
    return {key: getattr(config.eval, key) for key in _EVAL_KEYS}


def of_config(entries: Sequence[Entry], config: Config) -> list[Entry]:
    """Return the entries of the model that a run of `config` evaluates now."""
    own = settings(config)
    return [entry for entry in entries if entry.get("eval", own) == own]


def parse_run(record: Mapping[str, Any]) -> list[Result]:
    """Return the results of a run's results.json, which in earlier versions has names and values only."""
    if "records" in record:
        return from_json(record["records"])
    return flat_names.read(record.get("results") or {})


def parse_entries(entries: Sequence[Entry]) -> list[Result]:
    """Return the results of `entries`, which in earlier versions have names and values only."""
    results = []
    for entry in entries:
        if "records" in entry:
            results += from_json(entry["records"])
        else:
            results += flat_names.read({f"{entry['name']}/{key}": value for key, value in entry["metrics"].items()})
    return results


def add(
    path: epath.Path, entry: Entry, items: Mapping[str, PerExample], command: Mapping[str, Any], *, own: bool
) -> None:
    """Add an entry to a results file, which is created if it does not exist; waits for another process that does so.

    Args:
      path: of the file.
      entry: with all of `KEY`.
      items: of its metrics.
      command: keys of the file about the command that writes.
      own: whether the whole file is of the entry's checkpoint, also under former names of its folder.

    Raises:
      UserError: the file is damaged.
    """
    with file_lock.beside(path, wait=True):
        entries, items_of = read(path) if path.exists() else ([], {})
        if own:
            entries = [old | {"checkpoint": entry["checkpoint"]} for old in entries]
        entries = [old for old in entries if any(old.get(key) != entry[key] for key in KEY)]
        entry = entry | {"items": digest([entry[key] for key in KEY])}
        items_of = {old["items"]: items_of[old["items"]] for old in entries if old["items"] in items_of}
        _write_items(path, items_of | {entry["items"]: dict(items)})
        shown, others = latest([*entries, entry], entry["checkpoint"])
        write_json(
            path, {**command, **{key: shown[-1][key] for key in _VIEW}, "results": shown, "other_results": others}
        )


def latest(entries: Sequence[Entry], checkpoint: str | None = None) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of the newest step, of the model and profile evaluated last at this step; and all others.

    Args:
      entries: oldest first.
      checkpoint: of the first ones; by default that of the last entry.
    """
    checkpoint = entries[-1]["checkpoint"] if checkpoint is None else checkpoint
    own = [entry for entry in entries if entry["checkpoint"] == checkpoint]
    newest = max(entry["step"] for entry in own)
    last = next(entry for entry in reversed(own) if entry["step"] == newest)
    shown = [entry for entry in entries if all(entry[key] == last[key] for key in _VIEW)]
    return shown, [entry for entry in entries if entry not in shown]


def _items_path(path: epath.Path) -> epath.Path:
    """Return the file of the items of results file `path`."""
    return path.with_name(f"{path.name}.items.npz")


def _write_items(path: epath.Path, items_of: ItemsOf) -> None:
    """Write the items of all entries of results file `path`."""
    arrays = {}
    for entry, items in items_of.items():
        for name, item in items.items():
            for part in ("values", "weights", "other", "groups"):
                if (array := getattr(item, part)) is not None:
                    arrays[f"{item.statistic}:{part}:{entry}:{urllib.parse.quote(name, safe='')}"] = array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(_items_path(path), buffer.getvalue())


def _read_items(path: epath.Path, entries: Sequence[Entry]) -> ItemsOf:
    """Return the items of `entries`. Older files give entries no "items", and have one entry of each name."""
    for entry in entries:
        entry.setdefault("items", digest([entry.get(key) for key in KEY]))
    file, older = _items_path(path), path.with_name(f"{path.stem}.items.npz")
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    if file.exists() or older.exists():
        for key, array in _load(file if file.exists() else older, entries).items():
            # Older files have a bar for each slash.
            if "|" in key:
                statistic, part, name = key.replace("|", "/").split(":", 2)
                ids = [entry["items"] for entry in entries if name.startswith(f"{entry['name']}/")]
            else:
                statistic, part, entry_id, name = key.split(":", 3)
                ids, name = [entry_id], urllib.parse.unquote(name)
            for entry_id in ids:
                parts.setdefault((entry_id, name), {"statistic": statistic})[part] = array
    items_of: ItemsOf = {}
    for (entry_id, name), fields in parts.items():
        items_of.setdefault(entry_id, {})[name] = PerExample(**fields)
    return items_of


def _load(path: epath.Path, entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file, which may be somebody else's: unpacked at most what `entries` can have."""
    sizes = [n for entry in entries if isinstance(n := entry.get("n"), int) and n > 0]
    known = len(sizes) == len(entries)
    most = min(_ITEM_BYTES * sum(sizes) + (1 << 20), _MOST_BYTES) if known else _MOST_BYTES
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise ValueError(f"it unpacks to {format_bytes(size)}, and results of {sum(sizes):,} items have less")
        with np.load(content) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, --compare then gives no intervals.") from error
