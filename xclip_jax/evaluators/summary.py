"""Tables of results as text, and one line for an evaluation during a run."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from xclip_jax.addresses import public
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.base import Layout, Metric
from xclip_jax.evaluators.pair_sets import HELD_OUT
from xclip_jax.evaluators.provenance import SHIFTED, VALIDATION
from xclip_jax.evaluators.result import UNITS, Result

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
_HELD_OUT = "held-out pairs"  # what the sets named `HELD_OUT` are called
_LINES = (("items", ">14"), ("metric", ">11"), ("%", ">8"))  # columns of a table with a line for each metric
_OWN = (("own metric", ">18"), ("value", ">8"))  # last columns of a table with a set whose metric no other one shows
# Names of sets of files: a prefix such as "folder:", "imagenet@" or "module:Class:", and an absolute path or URL.
_PATH = re.compile(r"([^:@]*[:@](?:\w+:)??)((?:/|~|\w+://).+)")


class Table(NamedTuple):
    """A table whose rows are sets.

    Attributes:
      title: head of the column with the sets' names.
      columns: name of each further column, and its format with the least width; one without a name has the chance level
        of the one before.
      rows: name of the set and the cells; a name that begins with spaces continues the set above.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[str, list[str]]]


@dataclasses.dataclass
class Row:
    """The results of one set, or of one task on it.

    Attributes:
      name: of the set, and the task.
      family, role, evaluator: of its results.
      layout: the table that it is in.
      results: {metric: result} of the model's own score and all items.
      scores: {score: {metric: result}} of the other scores.
    """

    name: str
    family: str
    role: str
    evaluator: str
    layout: Layout
    results: dict[str, Result]
    scores: dict[str, dict[str, Result]]

    @property
    def own(self) -> list[tuple[Metric, Result]]:
        """The set's own metric, where the layout does not have it; else empty."""
        names = {metric.name for metric in self.layout.metrics}
        own = (result for result in self.results.values() if result.headline and result.metric not in names)
        return [(Metric(result.metric, result.metric, result.metric), result) for result in own]

    @property
    def shown(self) -> list[tuple[Metric, Result]]:
        """Metrics that tables show, the most important one first."""
        return [*self.own, *((m, self.results[m.name]) for m in self.layout.metrics if m.name in self.results)]


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row for each set and task in `results`, in their order; those without a metric are left out."""
    by_set: dict[tuple[str, str, str], Row] = {}
    for result in results:
        if result.group:
            continue
        key = (result.family, result.set, result.task)
        name = "/".join(filter(None, (result.set, result.task)))
        role, empty = result.protocol.role, Layout("", ())
        row = by_set.setdefault(key, Row(name, result.family, role, result.evaluator, empty, {}, {}))
        (row.scores.setdefault(result.score, {}) if result.score else row.results)[result.metric] = result
    for row in by_set.values():
        row.layout = _layout(row)
    return [row for row in by_set.values() if row.shown]


def _layout(row: Row) -> Layout:
    """Return the layout that the evaluator declares for these results, or one with a line for each of their metrics."""
    for layout in registry.layouts(row.evaluator):
        if row.family in layout.families and any(metric.name in row.results for metric in layout.metrics):
            return layout
    shown = sorted((r for r in row.results.values() if r.unit), key=lambda result: not result.headline)
    return Layout(row.family, (row.family,), tuple(Metric(r.metric, r.metric, r.metric) for r in shown), chance=True)


def title(family: str) -> str:
    """Return what a family is called in tables."""
    return _FAMILIES.get(family, family)


def label(row: Row) -> str:
    """Return the name in reports of the most important metric of a row."""
    return row.shown[0][0].label


def short_names(results: Sequence[Result]) -> dict[str, str]:
    """Return {row: its name in tables}, see `shorten`."""
    return shorten(row.name for row in rows(results))


def shorten(names_of_sets: Iterable[str]) -> dict[str, str]:
    """Return {name: short name}: of absolute paths and URLs only as many last parts as distinguish the sets.

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

    Held-out pairs, which are often all there is, are named by what is measured on them.
    """
    parts, short = [], short_names(results)
    for row in rows(results):
        shown = ", ".join(f"{metric.short} {result.value:.1f}" for metric, result in row.shown[:2])
        name = short[row.name] if row.name != HELD_OUT else "zero-shot" if row.family == "zeroshot" else row.family
        parts.append(f"{name} {shown}")
    return " | ".join(parts)


def tables(results: Sequence[Result]) -> list[Table]:
    """Return a table for each layout, then `families` where there are several; chance levels are in brackets."""
    everything, short = rows(results), short_names(results)
    # Layouts without columns differ in the metrics that a set has; those of one title share a table.
    layouts = {(layout.title, layout.columns): layout for layout in registry.layouts()}
    layouts |= {(row.layout.title, row.layout.columns): row.layout for row in everything}
    built = []
    for key, layout in layouts.items():
        chosen = [row for row in everything if (row.layout.title, row.layout.columns) == key]
        table = _grid(layout, chosen, everything) if layout.columns else _lines(layout, chosen)
        built.append(table._replace(rows=[(short.get(name, name), cells) for name, cells in table.rows]))
    return [table for table in (*built, families(results)) if len(table.rows) > (table.title == _FAMILIES_TITLE)]


def rows_of(table: Table, results: Sequence[Result]) -> dict[str, Row]:
    """Return {name in the table: row} of a table of `tables(results)`, without names that continue a set."""
    if table.title == _FAMILIES_TITLE:
        return representatives(results)
    short = short_names(results)
    return {short[row.name]: row for row in rows(results) if row.layout.title == table.title}


def render(results: Sequence[Result]) -> str:
    """Return the tables as text, each column as wide as its longest cell; empty without results."""
    shown, lines = tables(results), []
    names = [name for table in shown if table.title != _FAMILIES_TITLE for name, _ in table.rows]
    width = max([42, *(len(name) + 2 for name in names)])
    for title, columns, table_rows in shown:
        texts = [(title, [column for column, _ in columns]), *table_rows]
        forms = []
        for i, (_, form) in enumerate(columns):
            gap = 2 if form[0] == "<" else int(i > 0)  # the names before the first column have a gap already
            forms.append(f"{form[0]}{max(int(form[1:]), *(len(cells[i]) + gap for _, cells in texts))}")
        for name, cells in texts:
            line = "".join(f"{cell:{form}}" for cell, form in zip(cells, forms, strict=True))
            lines.append(f"{name:<{26 if title == _FAMILIES_TITLE else width}}{line}".rstrip())
    if any(
        cells[i]
        for _, columns, cells_of in shown
        for i, (head, _) in enumerate(columns)
        if not head
        for _, cells in cells_of
    ):
        lines.append("in brackets: the chance level, what guessing gives")
    return "\n".join(lines)


def _grid(layout: Layout, chosen: Sequence[Row], everything: Sequence[Row]) -> Table:
    """Return a table with a row for each set, and further ones for its scores and its gap to the reference."""
    columns: list[tuple[str, str]] = []
    for column in layout.columns:
        columns += [(column.title, column.format), *([("", column.chance)] if column.chance else [])]
    columns += _OWN if any(row.own for row in chosen) else ()
    references = [row for row in everything if row.family in layout.families and row.name == layout.reference]
    texts = []
    for row in chosen:
        own = [cell for metric, result in row.own for cell in (metric.name, _number(result))]
        texts.append((row.name, _cells(layout, row.results) + own))
        texts += [
            (f"  by {label}", _cells(layout, row.scores[score], levels=False))
            for score, label in layout.scores.items()
            if score in row.scores
        ]
        first = layout.metrics[0].name
        if row.role == SHIFTED and references and first in references[0].results:
            gap = dataclasses.replace(
                row.results[first], value=references[0].results[first].value - row.results[first].value
            )
            texts.append((f"  less than {layout.reference}", _cells(layout, {first: gap}, levels=False)))
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
    """Return the name of a metric in a column of percentages, with its unit where an evaluator has one of its own."""
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
    return Table(layout.title, (*_LINES, *([("", ">7")] if layout.chance else [])), texts)


def families(results: Sequence[Result]) -> Table:
    """Return a table of the first set of each family that is not for validation: its first metric and chance level."""
    short, texts = short_names(results), []
    for family, row in representatives(results).items():
        metric, result = row.shown[0]
        texts.append(
            (family, [short[row.name], _with_unit(metric.name, result), f"{result.value:.1f}", _chance(result)])
        )
    return Table(_FAMILIES_TITLE, (("set", "<30"), ("metric", "<18"), ("%", ">6"), ("chance", ">8")), texts)


def representatives(results: Sequence[Result]) -> dict[str, Row]:
    """Return {title of the family: row of its first set that is not for validation}."""
    everything = rows(results)
    tested = [row for row in everything if row.role != VALIDATION] or everything
    first: dict[str, Row] = {}
    for row in tested:
        first.setdefault(SHIFTED if row.role == SHIFTED else row.family, row)
    order = [*(family for family in _FAMILIES if family in first), *(f for f in first if f not in _FAMILIES)]
    return {title(family): first[family] for family in order}
