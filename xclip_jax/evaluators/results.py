"""The results file of `xclip_jax.evaluate`: one JSON file, evaluation.json, that later commands add to.

    checkpoint, step, profile, changes      of "results"
    results                                 entries of the newest step that was evaluated, and of the profile that was
                                            evaluated last at that step: what tables and reports show
    other_results                           entries of other steps, profiles and checkpoints, oldest first
    suite, config, environment, seconds     of the command that wrote last

An entry is one set's result: "set", "metric", "value", "n", "metrics" (all of them), "records" (the same with unit,
chance level and items), where the set is from and how the number was made ("split_hash", "protocol", "templates", ...),
and its own "checkpoint", "step", "profile" and "changes".
A new entry takes the place of one that equals it in `KEY`; all others stay.

FILE.items.npz beside it has what each item contributed to an entry's metrics, under "statistic:part:id:metric"; "id" is
the entry's "items", and the metric is quoted as in a URL.
"""

import io
import json
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.errors import UserError
from xclip_jax.evaluators import flat_names
from xclip_jax.evaluators.provenance import digest
from xclip_jax.evaluators.result import Result, from_json
from xclip_jax.evaluators.statistics import PerExample
from xclip_jax.storage import write_json

Entry = dict[str, Any]
ItemsOf = dict[str, dict[str, PerExample]]  # of an entry, by its "items"

KEY = ("set", "checkpoint", "step", "profile", "changes", "tokenizer", "text_length")
_VIEW = ("checkpoint", "step", "profile", "changes")


def read(path: epath.Path) -> tuple[list[Entry], ItemsOf]:
    """All entries of a results file, oldest first and those of "results" last, and their items.

    Raises:
      UserError: a file that is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with python -m xclip_jax.evaluate --checkpoint RUN.")
    try:
        record = json.loads(path.read_text())
        # Files of before these keys were an entry's own have one of each.
        whole = {key: record.get(key, default) for key, default in zip(_VIEW, ("", 0, "", {}), strict=True)}
        entries = [whole | entry for entry in (*record.get("other_results", ()), *record["results"])]
        _ = [(entry["set"], entry["value"], entry["name"], entry["metric"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a file of results ({error}); delete it, and evaluate again with --checkpoint."
        ) from error
    return entries, _read_items(path, entries)


def of_run(record: Mapping[str, Any]) -> list[Result]:
    """The results of a run's results.json, which of earlier versions has names and values alone."""
    if "records" in record:
        return from_json(record["records"])
    return flat_names.read(record.get("results") or {})


def of_entries(entries: Sequence[Entry]) -> list[Result]:
    """The results of `entries`, which of earlier versions have names and values alone."""
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
    """Puts an entry into a results file, which is made where it does not exist.

    Args:
      path: of the file.
      entry: with all of `KEY`.
      items: of its metrics.
      command: what the file says of the command that wrote last.
      own: whether all of the file is of the entry's checkpoint, whatever its folder was called before.

    Raises:
      UserError: there is a file, and it is damaged.
    """
    entries, items_of = read(path) if path.exists() else ([], {})
    if own:
        entries = [old | {"checkpoint": entry["checkpoint"]} for old in entries]
    entries = [old for old in entries if any(old.get(key) != entry[key] for key in KEY)]
    entry = entry | {"items": digest([entry[key] for key in KEY])}
    items_of = {old["items"]: items_of[old["items"]] for old in entries if old["items"] in items_of}
    _write_items(path, items_of | {entry["items"]: dict(items)})
    shown, others = latest([*entries, entry], entry["checkpoint"])
    write_json(path, {**command, **{key: shown[-1][key] for key in _VIEW}, "results": shown, "other_results": others})


def latest(entries: Sequence[Entry], checkpoint: str | None = None) -> tuple[list[Entry], list[Entry]]:
    """The entries of the newest step and, among several profiles, of that evaluated last at this step; and all others.

    Args:
      entries: oldest first.
      checkpoint: whose; by default that of the last entry.
    """
    checkpoint = entries[-1]["checkpoint"] if checkpoint is None else checkpoint
    of = [entry for entry in entries if entry["checkpoint"] == checkpoint]
    newest = max(entry["step"] for entry in of)
    last = next(entry for entry in reversed(of) if entry["step"] == newest)
    shown = [entry for entry in entries if all(entry[key] == last[key] for key in _VIEW)]
    return shown, [entry for entry in entries if entry not in shown]


def _items_path(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.items.npz")


def _write_items(path: epath.Path, items_of: ItemsOf) -> None:
    arrays = {}
    for entry, items in items_of.items():
        for name, item in items.items():
            for part in ("values", "weights", "other", "groups"):
                if (array := getattr(item, part)) is not None:
                    arrays[f"{item.statistic}:{part}:{entry}:{urllib.parse.quote(name, safe='')}"] = array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    target = _items_path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(target)


def _read_items(path: epath.Path, entries: Sequence[Entry]) -> ItemsOf:
    """The items of `entries`; those of an older file, which gives entries no "items", are its only ones by name."""
    for entry in entries:
        entry.setdefault("items", digest([entry.get(key) for key in KEY]))
    file, older = _items_path(path), path.with_name(f"{path.stem}.items.npz")
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    if file.exists() or older.exists():
        for key, array in _load(file if file.exists() else older).items():
            # Only older files have a bar, for a slash.
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


def _load(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, --compare then gives no intervals.") from error
