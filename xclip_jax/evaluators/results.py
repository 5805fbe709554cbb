"""Results of evaluations as records, and the file evaluation.json to which `xclip_jax.commands.evaluate` adds them.

    checkpoint, step, fingerprint           of "results"
    results                                 the last entry of each set at the newest evaluated step, with the model
                                            evaluated last at that step, for tables and reports
    other_results                           all other entries, oldest first
    suite, profile, changes,                of the last command that wrote the file
    config, environment, seconds

An entry contains the results of one set, see `make_entry`, with their "checkpoint", "step", "profile" and "changes";
"fingerprint" identifies the model, see `train.weights.fingerprint`, as weights may be moved, or replaced at the same
path. A new entry replaces one with the same values of `KEY`. FILE.items.npz stores the per-example values of the
entries' metrics under "statistic:part:id:metric": "id" is the entry's "items", the metric is quoted like a part of a
URL.
"""

import collections
import dataclasses
import hashlib
import io
import json
import math
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from xclip_jax.core.errors import UserError, redact
from xclip_jax.core.fields import keys_where
from xclip_jax.core.run_folder import lock
from xclip_jax.core.storage import unreadable_as, write_json, write_whole
from xclip_jax.data.labelled import Paths
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.statistics import PerExample

Entry = dict[str, Any]
ItemsOf = dict[str, dict[str, PerExample]]  # {an entry's "items": {name of a result: per-example values}}

VALIDATION, SHIFTED = "validation", "shifted"
UNITS = ("%", "x 100", "rank", "")  # units of this package's evaluators
LAST = "last"  # entry of the per-example values of results.json
KEY = ("set", "step", "profile", "changes", "fingerprint")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Provenance of an evaluation set; empty where unknown.

    Attributes:
      data, version, split: names of the data set, its version and its split.
      split_hash: `digest` of the set's contents, in order: labels, class names and texts; names and sizes of image
        files; name, version, split and number of items of a TFDS data set.
      protocol: the measurement, in words.
      templates: name of the prompt templates.
      preprocessing: preprocessing of the images, without mean and standard deviation, which belong to the model.
      metric: the metric to report.
      note: why the number is not comparable with published numbers.
      role: `VALIDATION` for model selection, `SHIFTED` for images of another style or source than the training data.
    """

    data: str = ""
    version: str = ""
    split: str = ""
    split_hash: str = ""
    protocol: str = ""
    templates: str = ""
    preprocessing: str = ""
    metric: str = "top1"
    note: str = ""
    role: str = ""


def digest(items: Iterable[Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of `items`, written as lines of JSON."""
    state = hashlib.sha256()
    for item in items:
        line = json.dumps(item, ensure_ascii=False, default=lambda x: x.tolist())
        state.update(line.encode("utf-8", "surrogatepass") + b"\n")  # names of files need not be UTF-8
    return state.hexdigest()[:16]


def contents(images: Sequence[Any]) -> list[tuple[str, int]]:
    """Return name and size in bytes of each image's file, for `digest`; [] for images outside files.

    Names are relative to the files' common folder, so they do not depend on the data set's place.
    """
    if not isinstance(images, Paths) or not len(images):
        return []
    paths = [os.path.abspath(path) for path in images.paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [(os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path).st_size) for path in paths]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One number of an evaluation.

    Attributes:
      set: name of the evaluation set; addresses are without passwords and signatures.
      family: "zeroshot", "retrieval", "choice", "visual", "textual", "dense", or a custom evaluator's name.
      metric: "top1", "image_to_text/r1"; also the sizes of the set, such as "n".
      value: the number in `unit`.
      unit: "%" for shares of the items, which have a binomial interval; "x 100" for other numbers times 100, such as
        correlations; "rank" from 1; "" for plain numbers.
      n: number of measured items, 0 if unknown.
      chance: expected value of a random answer, in `unit`; None if undefined.
      protocol: provenance of the set and protocol of the measurement.
      items: per-example values for the bootstrap; None if the metric cannot be resampled.
      task: one of several questions about the same items, such as "category".
      score: one of the model's similarities, such as "cross_entropy"; "" for its default one.
      group: a part of the items.
      headline: whether it is the number to report for its set.
      evaluator: the set's `evaluator`.
      dependent: whether the items are dependent or unequally weighted, see `PerExample.trials`; unused with `items`.
    """

    set: str
    family: str
    metric: str
    value: float
    unit: str = "%"
    n: int = 0
    chance: float | None = None
    protocol: Provenance = dataclasses.field(default_factory=Provenance)
    items: PerExample | None = None
    task: str = ""
    score: str = ""
    group: str = ""
    headline: bool = False
    evaluator: str = ""
    dependent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", redact(self.set))

    @property
    def key(self) -> str:
        """Name within the set, used in evaluation.json."""
        return "/".join(filter(None, (self.task, self.score, self.group, self.metric)))

    @property
    def name(self) -> str:
        """Name in metrics.jsonl, results.json and TensorBoard: "zeroshot/emoji/test_concepts/top1"."""
        return "/".join(filter(None, (self.family, self.set, self.key)))


def flat(results: Iterable[Result]) -> dict[str, float]:
    """Return {name: value}, in the order of the results."""
    return {result.name: result.value for result in results}


def items(results: Iterable[Result]) -> dict[str, PerExample]:
    """Return {name: per-example values} of results with items."""
    return {result.name: result.items for result in results if result.items is not None}


_PROTOCOL = ("role", "split_hash")
_OF_HEADLINE = ("protocol", "templates")  # sentences, equal for all results of a set
_DEFAULTS = {x.name: x.default for x in dataclasses.fields(Result) if x.name not in ("protocol", "items")}


def to_json(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return JSON records; default values, per-example values and most of the protocol are left out."""
    records = []
    for result in results:
        fields = {key: getattr(result, key) for key in _DEFAULTS}
        if result.items is not None:
            fields["dependent"] = result.items.trials() != len(result.items.values)
        keys = (*_PROTOCOL, *_OF_HEADLINE) if result.headline else _PROTOCOL
        fields |= {key: getattr(result.protocol, key) for key in keys}
        records.append({key: value for key, value in fields.items() if value != _DEFAULTS.get(key, "")})
    return records


def from_json(records: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Return the results of `to_json`; keys of later versions are ignored."""
    results = []
    for record in records:
        fields = {key: record[key] for key in _DEFAULTS if key in record}
        if record["value"] is None:  # JSON has no NaN
            fields["value"] = math.nan
        protocol = Provenance(**{key: record.get(key, "") for key in (*_PROTOCOL, *_OF_HEADLINE)})
        results.append(Result(**fields, protocol=protocol))
    return results


def read_entries(entries: Iterable[Entry]) -> list[Result]:
    """Return the results of entries."""
    return [result for entry in entries for result in from_json(entry["records"])]


def check(path: epath.Path) -> None:
    """Raise `UserError` if `add` would replace another program's file."""
    if path.exists():
        read(path)
    read_items(path)


def read(path: epath.Path, remedy: str = "delete it, or name another file") -> tuple[list[Entry], ItemsOf]:
    """Return all entries of a results file, oldest first and the entries of "results" last, and their items.

    `remedy` ends the error for other files.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with xclip-jax evaluate --checkpoint RUN --suite NAME.")
    with path.open("rb") as file:
        first = file.read(1)
        content = first + file.read() if first == b"{" else first  # files of weights may have gigabytes
    with unreadable_as(f"{path} is not a file of results; {remedy}"):
        record = json.loads(content)
        entries = [*record.get("other_results", ()), *record["results"]]
        _ = entries[0]
        for entry in entries:
            entry["value"] = math.nan if entry["value"] is None else entry["value"]  # JSON has no NaN
            _ = [entry[key] for key in (*KEY, "checkpoint", "name", "metric", "items")]
        read_entries(entries)
    return entries, read_items(path)


def make_entry(name: str, evaluator: str, results: Sequence[Result], preprocessing: Preprocessing) -> Entry:
    """Return a set's entry: its provenance, the headline as "value", all metrics by their keys, and the records.

    `name` is the set's name, `evaluator` is `Evaluator.name`, and `preprocessing` the model's preprocessing.
    """
    headline = next(result for result in results if result.headline)
    entry: Entry = {key: x for key, x in dataclasses.asdict(headline.protocol).items() if x and key != "role"}
    if "preprocessing" in entry:
        entry["preprocessing"] += f", {preprocessing.size} px, {preprocessing.normalization}"
    entry |= {"set": name, "name": evaluator, "metric": headline.key, "value": headline.value, "n": headline.n}
    return entry | {"metrics": {result.key: result.value for result in results}, "records": to_json(results)}


def settings(group: Any) -> dict[str, Any]:
    """Return an entry's "eval": the keys of the run's config group `eval` that change the model's results."""
    return {key: getattr(group, key) for key in keys_where(type(group), evaluation="model")}


def add(
    path: epath.Path, entry: Entry, items: Mapping[str, PerExample], command: Mapping[str, Any], *, own: bool
) -> None:
    """Add an entry with all of `KEY`, and its items, to a results file; waits while another process adds one.

    `command` are the file's keys about the command. Former names of the checkpoint are updated in older entries of the
    same model, or in all of them if the file is the checkpoint's `own`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path, blocking=True):
        entries, items_of = read(path) if path.exists() else ([], {})
        name = {"checkpoint": entry["checkpoint"]}
        entries = [old | name if own or old["fingerprint"] == entry["fingerprint"] else old for old in entries]
        entries = [old for old in entries if any(old[key] != entry[key] for key in KEY)]
        # The two files are not replaced at once: changed items must not meet the former entry of their key.
        entry = entry | {"items": digest([*(entry[key] for key in KEY), entry.get("split_hash"), entry["value"]])}
        items_of = {old["items"]: items_of[old["items"]] for old in entries if old["items"] in items_of}
        write_items(path, items_of | {entry["items"]: dict(items)})
        shown, others = latest([*entries, entry])
        view = {key: shown[-1][key] for key in ("checkpoint", "step", "fingerprint")}
        write_json(path, {**command, **view, "results": shown, "other_results": others})


def latest(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Split entries, oldest first, into those to show and all others, see "results" in the module's docstring.

    The first list has one entry per set, and the checkpoint of the last entry.
    """
    of_checkpoint = [entry for entry in entries if entry["checkpoint"] == entries[-1]["checkpoint"]]
    last = max(reversed(of_checkpoint), key=lambda entry: entry["step"])  # the newest of equals
    of_model = [entry for entry in entries if all(entry[key] == last[key] for key in ("step", "fingerprint"))]
    of_set = {entry["set"]: entry for entry in of_model}
    shown = [entry for entry in of_model if entry is of_set[entry["set"]]]
    return shown, [entry for entry in entries if entry not in shown]


def items_file(path: epath.Path) -> epath.Path:
    """Return the path of FILE.items.npz."""
    return path.with_name(f"{path.name}.items.npz")


def write_items(path: epath.Path, items_of: ItemsOf) -> None:
    """Write the per-example values of all entries of the results file `path`."""
    arrays = {}
    for entry, items in items_of.items():
        for name, item in items.items():
            for part in ("values", "weights", "other", "groups"):
                if (array := getattr(item, part)) is not None:
                    arrays[f"{item.statistic}:{part}:{entry}:{urllib.parse.quote(os.fsencode(name), safe='')}"] = array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(items_file(path), buffer.getvalue())


def read_items(path: epath.Path) -> ItemsOf:
    """Read the per-example values of the results file `path`."""
    file = items_file(path)
    fields = collections.defaultdict[tuple[str, ...], dict[str, Any]](dict)
    items_of: ItemsOf = {}
    with unreadable_as(f"{file} is damaged or another program's; delete it, --compare then gives no intervals"):
        for key, array in np.load(io.BytesIO(file.read_bytes())).items() if file.exists() else ():
            statistic, part, entry, name = key.split(":", 3)
            fields[statistic, entry, name][part] = array
        for (statistic, entry, name), arrays in fields.items():
            metric = urllib.parse.unquote(name, errors="surrogateescape")
            items_of.setdefault(entry, {})[metric] = PerExample(**arrays, statistic=statistic)
    return items_of
