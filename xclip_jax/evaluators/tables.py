"""Results as tables of text or as one line, and the comparison of two evaluations with bootstrap intervals."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from xclip_jax.core.errors import UserError, public
from xclip_jax.core.run_folder import evaluation_file
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import HELD_OUT, Layout, Metric
from xclip_jax.evaluators.results import SHIFTED, UNITS, VALIDATION, Entry, ItemsOf, Result, of_entries, read
from xclip_jax.evaluators.statistics import bootstrap

# Titles of families, in the order of their table; another family has its own name as title.
_FAMILIES = {
    "zeroshot": "zero-shot classification",
    SHIFTED: "out of domain",
    "retrieval": "retrieval",
    "visual": "visual representation",
    "textual": "textual representation",
    "dense": "dense representation",
}
_FAMILIES_TITLE = "overview"
_HELD_OUT = "held-out pairs"  # title of the sets named `HELD_OUT`
_LINE_COLUMNS = (("items", ">14"), ("metric", ">11"), ("%", ">8"))  # a table with a line for each metric
_EXTRA_COLUMNS = (("own metric", ">18"), ("value", ">8"))  # for sets whose headline has no column of its own
# Names of sets of files: a prefix such as "folder:", "imagenet@" or "module:Class:", and an absolute path or URL.
_PATH = re.compile(r"([^:@]*[:@](?:\w+:)??)((?:/|~|\w+://).+)")
# Sizes and statistics of pixels belong to the model.
_OF_MODEL = re.compile(r"(?<=side) to \d+|, \d+ px, .*")
_COMPARED_KEYS = ("split_hash", "version", "metric", "templates", "protocol")  # equal in entries that are compared


class Table(NamedTuple):
    """A table whose rows are sets.

    Attributes:
      title: head of the column with the sets' names.
      columns: name and format, with the least width, of each further column; a column without a name has the chance
        levels of the column before it.
      rows: name of the set and the cells; a name that begins with spaces continues the set above.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[str, list[str]]]


@dataclasses.dataclass
class Row:
    """The results of one set, or of one task on it.

    Attributes:
      name: name of the set, and the task.
      family, role, evaluator: copied from its results.
      results: {metric: result} by the model's own score, over all items.
      scores: {score: {metric: result}} by the other scores.
    """

    name: str
    family: str
    role: str
    evaluator: str
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    scores: dict[str, dict[str, Result]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def layout(self) -> Layout:
        """Layout that the evaluator declares for these results, or one with a line for each of their metrics."""
        for layout in registry.layouts(self.evaluator):
            if self.family in layout.families and any(metric.name in self.results for metric in layout.metrics):
                return layout
        shown = sorted((r for r in self.results.values() if r.unit), key=lambda result: not result.headline)
        metrics = tuple(Metric(result.metric, result.metric, result.metric) for result in shown)
        return Layout(self.family, (self.family,), metrics, chance=True)

    @property
    def set_specific(self) -> list[tuple[Metric, Result]]:
        """The set's headline, where the layout has no column for it; else empty."""
        names = {metric.name for metric in self.layout.metrics}
        unlisted = (result for result in self.results.values() if result.headline and result.metric not in names)
        return [(Metric(result.metric, result.metric, result.metric), result) for result in unlisted]

    @property
    def shown(self) -> list[tuple[Metric, Result]]:
        """Metrics that tables show, the most important one first."""
        metrics = self.layout.metrics
        return [*self.set_specific, *((m, self.results[m.name]) for m in metrics if m.name in self.results)]


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row for each set and task in `results`, in their order; sets without a metric are left out."""
    by_set: dict[tuple[str, str, str], Row] = {}
    for result in results:
        if result.group:
            continue
        key = (result.family, result.set, result.task)
        name = "/".join(filter(None, (result.set, result.task)))
        row = by_set.setdefault(key, Row(name, result.family, result.protocol.role, result.evaluator))
        (row.scores.setdefault(result.score, {}) if result.score else row.results)[result.metric] = result
    return [row for row in by_set.values() if row.shown]


def title(family: str) -> str:
    """Return the title of a family in tables."""
    return _FAMILIES.get(family, family)


def short_names(results: Sequence[Result]) -> dict[str, str]:
    """Return {row: its name in tables}, see `shorten`."""
    return shorten(row.name for row in rows(results))


def shorten(names_of_sets: Iterable[str]) -> dict[str, str]:
    """Return {name: short name}; absolute paths and URLs keep as many last parts as distinguish the sets.

    The sets "holdout" and "holdout@RUN" are "held-out pairs" and "held-out pairs of RUN".
    """
    names = {name: public(name) for name in names_of_sets}
    paths = {name: match.groups() for name, shown in names.items() if (match := _PATH.fullmatch(shown))}

    def end(prefix: str, path: str, depth: int) -> str:
        return prefix + "/".join(path.rstrip("/").split("/")[-depth:])

    for name, parts in paths.items():
        depth = 1
        while depth <= name.count("/") and [end(*p, depth) for p in paths.values()].count(end(*parts, depth)) > 1:
            depth += 1
        names[name] = end(*parts, depth)
    for name, short in names.items():
        held_out, _, run = short.partition("@")
        if held_out == HELD_OUT:
            names[name] = _HELD_OUT + (f" of {run}" if run else "")
    return names


def headlines(results: Sequence[Result]) -> str:
    """Return one line with the first two metrics of each set; empty without results.

    The run's held-out pairs, often the only set, go by the name of their family.
    """
    parts, short = [], short_names(results)
    for row in rows(results):
        shown = ", ".join(f"{metric.short} {result.value:.1f}" for metric, result in row.shown[:2])
        name = short[row.name] if row.name != HELD_OUT else "zero-shot" if row.family == "zeroshot" else row.family
        parts.append(f"{name} {shown}")
    return " | ".join(parts)


def build(results: Sequence[Result]) -> list[Table]:
    """Return a table for each layout, then `families` where there are several; chance levels are in brackets."""
    everything, short = rows(results), short_names(results)
    # Layouts without columns differ in the metrics that a set has; layouts of one title share a table.
    layouts = {(layout.title, layout.columns): layout for layout in registry.layouts()}
    layouts |= {(row.layout.title, row.layout.columns): row.layout for row in everything}
    built = []
    for key, layout in layouts.items():
        chosen = [row for row in everything if (row.layout.title, row.layout.columns) == key]
        table = _grid(layout, chosen, everything) if layout.columns else _lines(layout, chosen)
        built.append(table._replace(rows=[(short.get(name, name), cells) for name, cells in table.rows]))
    return [table for table in (*built, families(results)) if len(table.rows) > (table.title == _FAMILIES_TITLE)]


def row_by_name(table: Table, results: Sequence[Result]) -> dict[str, Row]:
    """Return {name in the table: row} of a table of `build(results)`, without names that continue a set."""
    if table.title == _FAMILIES_TITLE:
        return first_set_of_each_family(results)
    short = short_names(results)
    return {short[row.name]: row for row in rows(results) if row.layout.title == table.title}


def render(results: Sequence[Result]) -> str:
    """Return the tables as text, each column as wide as its longest cell; empty without results."""
    shown, lines, has_chance = build(results), [], False
    names = [name for table in shown if table.title != _FAMILIES_TITLE for name, _ in table.rows]
    width = max([42, *(len(name) + 2 for name in names)])
    for title, columns, table_rows in shown:
        texts = [[title, *(column for column, _ in columns)], *([name, *cells] for name, cells in table_rows)]
        formats = [f"<{26 if title == _FAMILIES_TITLE else width}", *(form for _, form in columns)]
        # The names leave a gap before the first column.
        gaps = [2 if form[0] == "<" else int(i > 1) for i, form in enumerate(formats)]
        lines += _align(texts, formats, gaps)
        levels = (cell for _, cells in table_rows for cell in cells if cell.startswith("("))
        has_chance |= title != _FAMILIES_TITLE and any(levels)
    return "\n".join([*lines, *["in brackets: the chance level, what guessing gives"] * has_chance])


def _align(lines: Sequence[Sequence[str]], formats: Sequence[str], gaps: Sequence[int]) -> list[str]:
    """Return lines of cells as text; columns have the alignment and least width of `formats`, and gaps."""
    columns = [
        f"{form[0]}{max(int(form[1:]), *(len(cells[i]) + gap for cells in lines))}"
        for i, (form, gap) in enumerate(zip(formats, gaps, strict=True))
    ]
    return ["".join(f"{cell:{form}}" for cell, form in zip(cells, columns, strict=True)).rstrip() for cells in lines]


def _grid(layout: Layout, chosen: Sequence[Row], everything: Sequence[Row]) -> Table:
    """Return a table with a row for each set, and further ones for its scores and its gap to the reference."""
    columns: list[tuple[str, str]] = []
    for column in layout.columns:
        columns += [(column.title, column.format), *([("", column.chance)] if column.chance else [])]
    columns += _EXTRA_COLUMNS if any(row.set_specific for row in chosen) else ()
    references = [row for row in everything if row.family in layout.families and row.name == layout.reference]
    texts = []
    for row in chosen:
        extra = [cell for metric, result in row.set_specific for cell in (metric.name, _number(result))]
        texts.append((row.name, _cells(layout, row.results) + extra))
        texts += [
            (f"  by {label}", _cells(layout, row.scores[score], levels=False))
            for score, label in layout.scores.items()
            if score in row.scores
        ]
        first = layout.metrics[0].name
        if row.role == SHIFTED and references and first in references[0].results:
            gap = references[0].results[first].value - row.results[first].value
            result = dataclasses.replace(row.results[first], value=gap)
            texts.append((f"  less than {layout.reference}", _cells(layout, {first: result}, levels=False)))
    texts = [(name, cells + [""] * (len(columns) - len(cells))) for name, cells in texts]
    return Table(layout.title, tuple(columns), texts)


def _cells(layout: Layout, results: Mapping[str, Result], levels: bool = True) -> list[str]:
    """Return the cells of a row; chance levels only if `levels`."""
    cells = []
    for column in layout.columns:
        result = results.get(column.metric)
        cells.append("" if result is None else _number(result))
        if column.chance:
            cells.append(_chance(result) if result and levels else "")
    return cells


def _number(result: Result) -> str:
    return f"{result.value:.1f}" if result.unit else f"{result.value:.0f}"


def _with_unit(metric: str, result: Result) -> str:
    """Return the name of a metric in a column of percentages, with its unit where an evaluator has its own."""
    return metric if result.unit in UNITS else f"{metric}, {result.unit}"


def _chance(result: Result) -> str:
    return "" if result.chance is None else f"({result.chance:.1f})"


def _lines(layout: Layout, chosen: Sequence[Row]) -> Table:
    """Return a table with a line for each metric of each set."""
    texts = []
    for row in chosen:
        for i, (metric, result) in enumerate(row.shown):
            cells = ["" if i else f"{result.n}", _with_unit(metric.short, result), _number(result)]
            cells += [_chance(result)] if layout.chance else []
            texts.append(("  the same" if i else row.name, cells))
    return Table(layout.title, (*_LINE_COLUMNS, *([("", ">7")] if layout.chance else [])), texts)


def families(results: Sequence[Result]) -> Table:
    """Return a table of `first_set_of_each_family`: its first metric and chance level."""
    short, texts = short_names(results), []
    for family, row in first_set_of_each_family(results).items():
        metric, result = row.shown[0]
        cells = [short[row.name], _with_unit(metric.name, result), f"{result.value:.1f}", _chance(result)]
        texts.append((family, cells))
    return Table(_FAMILIES_TITLE, (("set", "<30"), ("metric", "<18"), ("%", ">6"), ("chance", ">8")), texts)


def first_set_of_each_family(results: Sequence[Result]) -> dict[str, Row]:
    """Return {title of the family: row of its first set that is not for validation}."""
    everything = rows(results)
    tested = [row for row in everything if row.role != VALIDATION] or everything
    first: dict[str, Row] = {}
    for row in tested:
        first.setdefault(SHIFTED if row.role == SHIFTED else row.family, row)
    order = [*(family for family in _FAMILIES if family in first), *(f for f in first if f not in _FAMILIES)]
    return {title(family): first[family] for family in order}


def compare(
    a: str, b: str, *, step: int | None = None, profile: str | None = None, refused: list[str] | None = None
) -> list[dict[str, Any]]:
    """Compare two evaluations set by set.

    Returns for each set {set, metric, unit, a, b, difference, low, high, step_a, step_b, profile}; the unit is
    `Result.unit`. Ranks have "ratio", b / a, instead of the difference b - a. The interval, low to high, is the 95 %
    percentile bootstrap of the paired difference or ratio; absent for metrics that cannot be resampled.

    Args:
      a, b: runs' folders, or results files of `xclip_jax.commands.evaluate`.
      step: step of both; by default the newest that each file has.
      profile: profile of both; by default the last evaluated profile that both files have for a set.
      refused: list to which a sentence is added for each set whose data or protocol differ; without it the first one is
        an error.

    Raises:
      UserError: a file that is missing or damaged, no set in common, or sets whose data or protocol differ.
    """
    (entries_a, items_a), (entries_b, items_b) = _select(a, step, profile), _select(b, step, profile)
    compared = []
    for name in dict.fromkeys(entry["set"] for entry in entries_a):
        of_a, of_b = ([entry for entry in entries if entry["set"] == name] for entries in (entries_a, entries_b))
        if not of_b:
            continue
        left, right = _pair(of_a, of_b)
        try:
            _check_comparable(left, right, f"in {a} and {b}")
        except UserError as error:
            if refused is None:
                raise
            refused.append(str(error))
            continue
        unit = next((result.unit for result in of_entries([left]) if result.headline), "%")
        ratio = unit == "rank"  # a geometric mean: half the rank is as good at 200 as at 20
        row = {"set": name, "metric": left["metric"], "unit": unit, "a": left["value"], "b": right["value"]}
        row |= {"step_a": left["step"], "step_b": right["step"], "profile": left["profile"]}
        row |= {"ratio": right["value"] / left["value"]} if ratio else {"difference": right["value"] - left["value"]}
        compared.append(row | _interval(left, right, items_a, items_b, ratio=ratio))
    if not compared and not refused:
        raise UserError(f"{a} and {b} have no set in common; evaluate both with the same --suite.")
    return compared


def _select(path: str, step: int | None, profile: str | None) -> tuple[list[Entry], ItemsOf]:
    """Return the entries of one step, the newest by default, of the checkpoint and model that were evaluated last."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{str(path)!r} does not exist; name the folder of a run, or a file of results.")
    file = evaluation_file(file) if file.is_dir() else file
    entries, items = read(file)
    if not entries:
        raise UserError(f"{file} has no results; evaluate again with --checkpoint.")
    entries = [entry for entry in entries if entry["checkpoint"] == entries[-1]["checkpoint"]]
    steps = sorted({entry["step"] for entry in entries})
    selected = steps[-1] if step is None else step
    if selected not in steps:
        raise UserError(f"{file} has no results of step {step}, only of {', '.join(map(str, steps))}.")
    entries = [entry for entry in entries if entry["step"] == selected]
    last = entries[-1]["fingerprint"]
    entries = [e for e in entries if e["fingerprint"] == last and profile in (None, e["profile"])]
    if not entries:
        raise UserError(f"{file} has no results of step {selected} and profile {profile!r}.")
    return entries, items


def _pair(lefts: Sequence[Entry], rights: Sequence[Entry]) -> tuple[Entry, Entry]:
    """Return the last entries of one profile, or else the last two."""
    pairs = [(x, y) for x in lefts for y in rights if all(x[key] == y[key] for key in ("profile", "changes"))]
    return pairs[-1] if pairs else (lefts[-1], rights[-1])


def _check_comparable(left: Entry, right: Entry, files: str) -> None:
    """Raise `UserError` where the data or the protocol of two entries of a set differ."""
    # Within one profile images are resized as the profile, or else each model, defines it.
    resizing = ("preprocessing",) if left["profile"] != right["profile"] else ()
    for key in (*_COMPARED_KEYS, *resizing):
        a, b = (_OF_MODEL.sub("", x.get(key, "")) if key == "preprocessing" else x.get(key) for x in (left, right))
        if a != b:
            raise UserError(
                f"{left['set']} is not the same {files}: {key} is {a!r} and {b!r}; "
                "evaluate both again with the same data and --profile."
            )


def _interval(left: Entry, right: Entry, items_a: ItemsOf, items_b: ItemsOf, *, ratio: bool) -> dict[str, float]:
    """Return {"low", "high"} of the difference or ratio, or {} for a metric that cannot be resampled."""
    metric = f"{left['name']}/{left['metric']}"
    of_a, of_b = (items.get(entry["items"], {}) for items, entry in ((items_a, left), (items_b, right)))
    if metric not in of_a or metric not in of_b:
        return {}
    _, low, high = bootstrap(of_a[metric], of_b[metric], ratio=ratio)
    return {} if math.isnan(low) else {"low": low, "high": high}


def render_comparison(compared: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """Return the rows of `compare` as a table, each difference in the unit of its row, and ratios after an "x".

    A star marks intervals that exclude equality.
    """
    lines = [f"{side.upper()}: {file}, step {compared[0][f'step_{side}']}" for side, file in (("a", a), ("b", b))]
    short = shorten(row["set"] for row in compared)
    texts = [["set", "metric", "unit", "A", "B", "B - A", "   95 % interval"]]
    for row in compared:
        ratio = "ratio" in row
        equal, number = (1, ".2f") if ratio else (0, "+.1f")
        change = f"x {row['ratio']:.2f}" if ratio else f"{row['difference']:+.1f}"
        interval = f"   {row['low']:{number}} to {row['high']:{number}}" if "low" in row else ""
        interval += " *" if interval and not row["low"] <= equal <= row["high"] else ""
        values = (f"{row[key]:.{2 if ratio else 1}f}" for key in ("a", "b"))
        texts.append([short[row["set"]], row["metric"], row["unit"], *values, change, interval])
    lines += _align(texts, ("<36", "<24", "<6", ">8", ">8", ">8", "<0"), (2,) * 7)
    if any("ratio" in row for row in compared):
        lines.append("x: B / A, of ranks from 1; less is better")
    return "\n".join(lines)
