"""Line charts of logged metrics, and the numbers on their axes; the template's macro `chart` draws them."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.evaluators import tables
from xclip_jax.objectives import Curve
from xclip_jax.report.collect import Key, Run, short_set_names

POINTS = 400  # most points of a line; longer lines are averaged
_LOGGED = (  # key, title, unit
    ("loss", "Loss, weighted sum of the terms", "nats"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
    ("param_norm", "Parameter norm", ""),
    ("samples_per_second", "Speed", "samples/s"),
    ("mfu", "MFU", "%"),
    ("goodput", "Goodput", "%"),
    ("data/bad_share", "Bad samples", "%"),
)
Rows = Sequence[Mapping[str, float]]


class Line(NamedTuple):
    """A named curve of values `y` over steps `x`, in the colour of this number."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int


class Level(NamedTuple):
    """A dashed line at y with a short name; `below` shades the area under it as an alarm."""

    name: str
    y: float
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart over steps `x` with the ranges of its axes; `chart` makes it."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[Level]
    unit: str
    note: str
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        """Return the horizontal position of a step, from 0 to 1."""
        return (x - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, y: float) -> float:
        """Return the vertical position of a value, from 0 at the bottom to 1."""
        return (y - self.y[0]) / (self.y[1] - self.y[0])

    def points(self, line: Line, width: int, height: int) -> str:
        """Return the points of an SVG polyline in a plot of `width` x `height`."""
        places = zip(map(self.across, line.x), map(self.up, line.y), strict=True)
        return " ".join(f"{width * x:.1f},{height * (1 - y):.1f}" for x, y in places)

    def ticks(self, axis: str) -> list[tuple[float, str]]:
        """Return (position, label) of the ticks of axis "x" or "y"."""
        values = ticks(*(self.x if axis == "x" else self.y), 5)
        return list(zip(map(self.across if axis == "x" else self.up, values), tick_labels(values), strict=True))

    @property
    def data(self) -> str:
        """The values as JSON for the page's script."""
        lines = [line._asdict() | {"y": [float(f"{value:.5g}") for value in line.y]} for line in self.lines]
        return json.dumps({"x": self.x, "y": self.y, "unit": self.unit, "lines": lines})


def chart(
    title: str, lines: Sequence[Line], levels: Sequence[Level] = (), *, unit: str = "", note: str = ""
) -> Chart | None:
    """Return a chart of the finite values of `lines` with the sentence `note` below, or None without values."""
    drawn = [line for line in map(_short, lines) if line.x]
    if not drawn:
        return None
    left = min(min(line.x) for line in drawn)
    right = max(max(line.x) for line in drawn)
    ends = [*(v for line in drawn for v in line.y), *(level.y for level in levels)]
    x = (left, right if right > left else left + 1)
    return Chart(title, drawn, levels, unit, note, x, _range(min(ends), max(ends)))


def metric_lines(rows: Rows, metrics: Sequence[tuple[str, str]], unit: str = "") -> list[Line]:
    """Return a line for each logged (key, label) of `metrics`, in percent if `unit` is "%"."""
    lines = []
    scale = 100.0 if unit == "%" else 1.0
    for color, (key, label) in enumerate(metrics):
        logged = [row for row in rows if key in row]
        if logged:
            lines.append(Line(label, [r["step"] for r in logged], [scale * r[key] for r in logged], color))
    return lines


def term_chart(curve: Curve, rows: Rows, term: str) -> Chart | None:
    """Return the chart of a curve declared by an objective's term, with its levels at the last row, or None."""
    lines = metric_lines(rows, [(f"{term}/{key}", label) for key, label in curve.lines], curve.unit)
    scale = 100.0 if curve.unit == "%" else 1.0
    levels = [Level("alarm", scale * curve.check.threshold, below=True)] if curve.check else []
    for label, source in curve.levels:
        value = rows[-1].get(f"{term}/{source}") if isinstance(source, str) else source
        if value is not None:
            levels.append(Level(label, scale * value))
    return chart(curve.title, lines, levels, unit=curve.unit, note=curve.note)


def number(value: float) -> str:
    """Format a number with about three digits: 1,024; 7.5; 0.031; 2.5e-5."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.1f}" if size >= 100 and value % 1 else f"{value:.3g}"


def decimals(value: float, form: str = ".1f") -> str:
    """Format a result in the given form, or as `number` does if it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else number(value)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most `count` + 1 round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Format the numbers of an axis with enough digits to distinguish them: 33.25, 33.50, 33.75."""
    close = functools.partial(math.isclose, rel_tol=1e-6, abs_tol=1e-12)
    texts = [number(value) for value in values]
    if all(close(float(text.replace(",", "")), value) for text, value in zip(texts, values, strict=True)):
        return texts
    digits = next(digits for digits in range(1, 16) if all(close(round(value, digits), value) for value in values))
    return [f"{value:,.{digits}f}" for value in values]


def _short(line: Line) -> Line:
    """Return the finite points of a line, averaged to at most `POINTS`."""
    points = np.array([line.x, line.y], float)
    points = points[:, np.isfinite(points[1])]
    if points.shape[1] > POINTS:
        points = np.stack([part.mean(axis=1) for part in np.array_split(points, POINTS, axis=1)], axis=1)
        points[0] = np.round(points[0])
    x, y = points.tolist()
    return line._replace(x=x, y=y)


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the range of the vertical axis: from 0 if `low` is near 0, otherwise with a margin on both sides."""
    if math.isclose(low, high):  # equal values, whose means are rounded
        if not low:
            return 0.0, 1.06
        low -= abs(low) / 2
        high += abs(high) / 2
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.06 * high
    room = 0.08 * (high - low)
    return low - room, high + room


def of_runs(runs: Sequence[Run]) -> list[Chart]:
    """Return charts of all logged metrics, with one line per run if there are several."""
    drawn = [*_curves(runs), *_evaluations(runs)]
    for key, title, unit in _LOGGED:
        lines = [line for run in runs for line in _lines(run, key, run.name if len(runs) > 1 else title, unit)]
        if key != "data/bad_share" or any(any(line.y) for line in lines):
            drawn.append(chart(title, lines, unit=unit))
    return list(filter(None, drawn))


def _lines(run: Run, key: str, name: str, unit: str = "") -> list[Line]:
    """Return the line of a run's metric, if logged; speeds omit the first step, which compiles."""
    rows = run.record.training
    if key in ("samples_per_second", "mfu", "goodput"):
        rows = [row for row in rows if row.get("samples_per_second")]
    return [line._replace(color=run.color) for line in metric_lines(rows, ((key, name),), unit)]


def _curves(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield charts of the terms' curves: with several runs one chart per metric without levels, else per curve."""
    declared: dict[tuple[str, str], tuple[Curve, str]] = {}
    for run in runs:
        for name, term in run.record.objective.terms.items():
            for curve in term.curves():
                if len(runs) == 1 and run.record.training:
                    yield term_chart(curve, run.record.training, name)
                for key, label in curve.lines if len(runs) > 1 else ():
                    title = f"{curve.title}: {label}" if len(curve.lines) > 1 else curve.title
                    declared.setdefault((name, key), (curve, title))
    for (term, key), (curve, title) in declared.items():
        lines = [line for run in runs for line in _lines(run, f"{term}/{key}", run.name, curve.unit)]
        yield chart(title, lines, unit=curve.unit, note=curve.note)


def _evaluations(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield charts of each repeatedly evaluated set's first metric: with several runs one per set, else per unit."""
    points: dict[tuple[Key, str, str], dict[int, dict[float, float]]] = {}
    for run in runs:
        for step, results in run.record.evaluations:
            for row in tables.rows(results):
                metric, result = row.shown[0]
                key = ((row.family, row.name), metric.label, result.unit)
                points.setdefault(key, {}).setdefault(run.color, {})[step] = result.value
    short = short_set_names(runs)
    names = {run.color: run.name for run in runs}
    by_unit: dict[str, list[Line]] = {}
    for (key, label, unit), colors in points.items():
        if max(map(len, colors.values())) < 2:
            continue
        title = f"{short[key[1]]}, {label}"
        lines = [Line(names[color], list(own), list(own.values()), color) for color, own in colors.items()]
        if len(runs) > 1:
            yield chart(title, lines, unit=unit)
        else:
            drawn = by_unit.setdefault(unit, [])
            drawn.append(lines[0]._replace(name=title, color=len(drawn) % 8))
    yield from (chart("Evaluation during training", lines, unit=unit) for unit, lines in by_unit.items())
