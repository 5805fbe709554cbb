"""Results as text tables or as one line, and comparisons of two evaluations with bootstrap intervals."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xclip_jax.core.errors import UserError, redact
from xclip_jax.core.storage import as_path
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import HELD_OUT, Column, Layout
from xclip_jax.evaluators.results import SHIFTED, UNITS, VALIDATION, Entry, ItemsOf, Result, read, read_entries
from xclip_jax.evaluators.statistics import bootstrap
from xclip_jax.interop.hub import results_file

# Titles of families, in the order of their tiles on a page; other families are titled by their name.
_FAMILIES = {
    "zeroshot": "zero-shot classification",
    SHIFTED: "out of domain",
    "retrieval": "retrieval",
    "choice": "choice of texts",
    "visual": "visual representation",
    "textual": "textual representation",
    "dense": "dense representation",
}
# Sets of files: a prefix such as "folder:", "imagenet@" or "module:Class:", and an absolute path or URL.
_PATH = re.compile(r"([^:@]*[:@](?:\w+:)??)((?:/|~|\w+://).+)")
_COMPARED_KEYS = ("split_hash", "version", "metric", "templates", "protocol", "profile", "n")


@dataclasses.dataclass
class Row:
    """The results of one set, or of one task on it."""

    name: str  # of the set, and the task
    family: str  # for family, role and evaluator see `Result`
    role: str
    evaluator: str
    results: dict[str, Result] = dataclasses.field(default_factory=dict)  # {metric: result} by the default score
    scores: dict[str, dict[str, Result]] = dataclasses.field(default_factory=dict)  # {score: ...} by the others

    @functools.cached_property
    def layout(self) -> Layout:
        """The evaluator's layout for these results, or one without columns."""
        for layout in registry.layouts(self.evaluator):
            if any(column.label and column.metric in self.results for column in layout.columns):
                return layout
        return Layout(self.family, ())

    @property
    def set_specific(self) -> list[tuple[Column, Result]]:
        """The set's headline if the layout has no column for it, else empty."""
        metrics = {column.metric for column in self.layout.columns}
        return [(Column(key, key, key), x) for key, x in self.results.items() if x.headline and key not in metrics]

    @property
    def shown(self) -> list[tuple[Column, Result]]:
        """Metrics in tables, the most important one first."""
        labelled = [column for column in self.layout.columns if column.label and column.metric in self.results]
        labelled.sort(key=lambda column: not self.results[column.metric].headline)
        return [*self.set_specific, *((column, self.results[column.metric]) for column in labelled)]


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per set and task in `results`, in their order; sets without a metric are left out."""
    by_set: dict[tuple[str, str, str], Row] = {}
    for result in results:
        if result.group:
            continue
        key = (result.family, result.set, result.task)
        name = "/".join(filter(None, (result.set, result.task)))
        row = by_set.setdefault(key, Row(name, result.family, result.protocol.role, result.evaluator))
        metrics = row.scores.setdefault(result.score, {}) if result.score else row.results
        metrics[result.metric] = result
    return [row for row in by_set.values() if row.shown]


def shorten(names_of_sets: Iterable[str]) -> dict[str, str]:
    """Return {name: short name}; absolute paths and URLs keep the last parts needed to distinguish the sets.

    The sets "holdout" and "holdout@RUN" are "held-out pairs" and "held-out pairs of RUN".
    """
    names = {name: redact(name) for name in names_of_sets}
    matches = {name: match for name, shown in names.items() if (match := _PATH.fullmatch(shown))}

    def end(match: re.Match[str], depth: int) -> str:
        return match[1] + "/".join(match[2].rstrip("/").split("/")[-depth:])

    for name, match in matches.items():
        depth = 1
        while depth <= name.count("/") and [end(x, depth) for x in matches.values()].count(end(match, depth)) > 1:
            depth += 1
        names[name] = end(match, depth)
    for name, short in names.items():
        if short.partition("@")[0] == HELD_OUT:
            names[name] = short.replace(HELD_OUT, "held-out pairs", 1).replace("@", " of ", 1)
    return names


def headlines(results: Sequence[Result]) -> str:
    """Return one line with the first two metrics of each set; empty without results."""
    parts = []
    everything = rows(results)
    short = shorten(row.name for row in everything)
    for row in everything:
        shown = ", ".join(f"{column.title} {result.value:.1f}" for column, result in row.shown[:2])
        parts.append(f"{short[row.name]} {shown}")
    return " | ".join(parts)


def render(results: Sequence[Result]) -> str:
    """Return one table per layout as text, with chance levels in brackets; empty without results."""
    everything = rows(results)
    short = shorten(row.name for row in everything)
    layouts = {layout.title: layout for layout in registry.layouts()}
    layouts |= {row.layout.title: row.layout for row in everything}
    chosen = [(layout, [row for row in everything if row.layout.title == title]) for title, layout in layouts.items()]
    tables = [_grid(layout, some, short) for layout, some in chosen if some]
    width = max([42, *(len(cells[0]) + 2 for table in tables for cells in table)])
    lines = []
    for table in tables:
        lines += _align(table, [f"<{width}", *[">8"] * (len(table[0]) - 1)])
    if any(cell.startswith("(") for table in tables for cells in table for cell in cells):
        lines.append("in brackets: the chance level, what guessing gives")
    return "\n".join(lines)


def _align(lines: Sequence[Sequence[str]], formats: Sequence[str]) -> list[str]:
    """Return lines of cells as text; columns have the alignment and minimum width of `formats`."""
    columns = [
        f"{form[0]}{max(int(form[1:]), *(len(cells[i]) + 2 for cells in lines))}" for i, form in enumerate(formats)
    ]
    return ["".join(f"{cell:{form}}" for cell, form in zip(cells, columns, strict=True)).rstrip() for cells in lines]


def _grid(layout: Layout, chosen: Sequence[Row], short: Mapping[str, str]) -> list[list[str]]:
    """Return the titles of a layout's columns, one line of cells per set, and further ones for its scores."""
    head = [layout.title]
    for column in layout.columns:
        head += [column.title, ""] if column.chance else [column.title]
    if any(row.set_specific for row in chosen):
        head += ["own metric", "value"]
    lines = []
    for row in chosen:
        cells = [short[row.name], *_cells(layout, row.results)]
        for column, result in row.set_specific:
            unit = "" if result.unit in UNITS else f", {result.unit}"
            cells += [column.metric + unit, _number(result)]
        lines.append(cells)
        for score, label in layout.scores.items():
            if score in row.scores:
                lines.append([f"  by {label}", *_cells(layout, row.scores[score], levels=False)])
    return [head, *(cells + [""] * (len(head) - len(cells)) for cells in lines)]


def _cells(layout: Layout, results: Mapping[str, Result], levels: bool = True) -> list[str]:
    """Return a row's cells; chance levels are empty unless `levels`."""
    cells = []
    for column in layout.columns:
        result = results.get(column.metric)
        cells.append("" if result is None else _number(result))
        if column.chance:
            level = result.chance if result is not None and levels else None
            cells.append("" if level is None else f"({level:.1f})")
    return cells


def _number(result: Result) -> str:
    return f"{result.value:.1f}" if result.unit else f"{result.value:.0f}"


def first_set_of_each_family(results: Sequence[Result]) -> dict[str, Row]:
    """Return {title of a family: row of its first test set}."""
    everything = rows(results)
    first: dict[str, Row] = {}
    for row in [row for row in everything if row.role != VALIDATION] or everything:
        first.setdefault(SHIFTED if row.role == SHIFTED else row.family, row)
    families = dict.fromkeys((*_FAMILIES, *first))
    return {_FAMILIES.get(family, family): first[family] for family in families if family in first}


def compare(a: str, b: str, *, step: int | None = None, refused: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare two evaluations set by set, by the last evaluated profile that both have for a set.

    Returns {set, metric, unit, a, b, difference, low, high, step_a, step_b, profile, preprocessing_a, preprocessing_b}
    for each set; the unit is `Result.unit`. The interval, low to high, is the 95 % percentile bootstrap of the paired
    difference b - a, absent for metrics without items.

    Args:
      a, b: runs' folders, evaluated weights, or results files.
      step: step of both; by default the newest in each file.
      refused: collects a sentence per set with different data or protocols; without it the first one is an error.
    """
    entries_a, items_a = _select(a, step)
    entries_b, items_b = _select(b, step)
    compared = []
    for name in dict.fromkeys(entry["set"] for entry in entries_a):
        of_both = ([entry for entry in entries if entry["set"] == name] for entries in (entries_a, entries_b))
        pairs = list(itertools.product(*of_both))
        if not pairs:
            continue
        same = [(x, y) for x, y in pairs if x["profile"] == y["profile"] and x["changes"] == y["changes"]]
        left, right = (same or pairs)[-1]
        if different := [key for key in _COMPARED_KEYS if left.get(key) != right.get(key)]:
            key = different[0]
            fault = (
                f"{name} is not the same in {a} and {b}: {key} is {left.get(key)!r} and {right.get(key)!r}; evaluate "
                "both again alike, or without it and with another --output."
            )
            if refused is None:
                raise UserError(fault)
            refused.append(fault)
            continue
        unit = next((result.unit for result in read_entries([left]) if result.headline), "%")
        row = {"set": name, "metric": left["metric"], "unit": unit, "a": left["value"], "b": right["value"]}
        row |= {"step_a": left["step"], "step_b": right["step"], "profile": left["profile"]}
        row |= {f"preprocessing_{side}": x.get("preprocessing", "") for side, x in (("a", left), ("b", right))}
        row["difference"] = right["value"] - left["value"]
        key = f"{left['name']}/{left['metric']}"
        of_a = items_a.get(left["items"], {})
        of_b = items_b.get(right["items"], {})
        if key in of_a and key in of_b:
            low, high = bootstrap(of_a[key], of_b[key])
            row |= {} if math.isnan(low) else {"low": low, "high": high}
        compared.append(row)
    if not compared and not refused:
        raise UserError(f"{a} and {b} have no set in common; evaluate both with the same --suite.")
    return compared


def _select(path: str, step: int | None) -> tuple[list[Entry], ItemsOf]:
    """Return the entries of one step, by default the newest, of the checkpoint and model evaluated last."""
    file = as_path(path)
    own = results_file(path)
    if not (file.exists() or own.exists()):
        raise UserError(f"{str(path)!r} does not exist; name the folder of a run, weights, or a file of results.")
    if file.is_dir() or own.exists():
        file = own
        entries, items = read(file)
    else:
        entries, items = read(file, f"if it has weights, evaluate them first: xclip-jax evaluate --checkpoint {path}")
    entries = [entry for entry in entries if entry["checkpoint"] == entries[-1]["checkpoint"]]
    known = sorted({entry["step"] for entry in entries})
    selected = known[-1] if step is None else step
    entries = [entry for entry in entries if entry["step"] == selected]
    if not entries:
        raise UserError(f"{file} has results of the steps {known}, not of {selected}; name one, or evaluate it.")
    return [entry for entry in entries if entry["fingerprint"] == entries[-1]["fingerprint"]], items


def render_comparison(compared: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """Return the rows of `compare` as a table; a star marks intervals without zero."""
    lines = [f"{side.upper()}: {file}, step {compared[0][f'step_{side}']}" for side, file in (("a", a), ("b", b))]
    short = shorten(row["set"] for row in compared)
    texts = [["set", "metric", "unit", "A", "B", "B - A", "   95 % interval"]]
    for row in compared:
        interval = f"   {row['low']:+.1f} to {row['high']:+.1f}" if "low" in row else ""
        interval += " *" if interval and not row["low"] <= 0 <= row["high"] else ""
        values = (f"{row[key]:{form}}" for key, form in (("a", ".1f"), ("b", ".1f"), ("difference", "+.1f")))
        texts.append([short[row["set"]], row["metric"], row["unit"], *values, interval])
    lines += _align(texts, ("<36", "<24", "<6", ">8", ">8", ">8", "<0"))
    return "\n".join([*lines, *prepared_differently(compared, "A", "B")])


def prepared_differently(compared: Sequence[Mapping[str, Any]], a: str, b: str) -> list[str]:
    """Return one line per set of `compare` whose images are preprocessed differently on sides `a` and `b`."""
    short = shorten(row["set"] for row in compared)
    views = {short[row["set"]]: (row.get("preprocessing_a"), row.get("preprocessing_b")) for row in compared}
    return [f"{name}: images in {a}: {x}; in {b}: {y}" for name, (x, y) in views.items() if x != y]
