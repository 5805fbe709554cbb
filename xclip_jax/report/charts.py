"""Line charts: the lines of logged metrics, and the numbers on their axes. The template's macro `chart` draws them."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xclip_jax.evaluators import tables
from xclip_jax.objectives import Curve
from xclip_jax.report.collect import Key, Run, labels, rows_of

POINTS = 400  # at most in a line; longer lines are averaged
_LOGGED = (  # key, title, unit
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
    """A curve: its name, steps and values, and the number of its colour."""

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
    """A chart with its ranges and ticks, over steps or what `axis` names; `chart` makes it."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[Level]
    unit: str
    note: str
    x: tuple[float, float]
    y: tuple[float, float]
    axis: str = "step"

    def across(self, x: float) -> float:
        """Return the place of a step, 0 at the left and 1 at the right."""
        return (x - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, y: float) -> float:
        """Return the place of a value, 0 at the bottom and 1 at the top."""
        return (y - self.y[0]) / (self.y[1] - self.y[0])

    def points(self, line: Line, width: int, height: int) -> str:
        """Return the points of a line in an SVG of `width` x `height`."""
        places = zip(map(self.across, line.x), map(self.up, line.y), strict=True)
        return " ".join(f"{width * x:.1f},{height * (1 - y):.1f}" for x, y in places)

    def ticks(self, axis: str) -> list[tuple[float, str]]:
        """Return the places of the ticks of axis "x" or "y", from 0 to 1, and their labels."""
        (low, high), place = (self.x, self.across) if axis == "x" else (self.y, self.up)
        values = ticks(low, high, 5)
        return list(zip(map(place, values), tick_labels(values), strict=True))

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        ranges = "; ".join(f"{z.name} from {number(z.y[0])} to {number(z.y[-1])}" for z in self.lines)
        over = "steps" if self.axis == "step" else self.axis
        text = f"{self.title}, {over} {number(self.x[0])} to {number(self.x[1])}: {ranges}."
        if self.levels:
            text += f" Lines at {', '.join(f'{level.name} ({number(level.y)})' for level in self.levels)}."
        return text

    @property
    def data(self) -> str:
        """The values in JSON, for the page's script."""
        lines = [
            {"name": z.name, "color": z.color, "x": z.x, "y": [float(f"{value:.5g}") for value in z.y]}
            for z in self.lines
        ]
        return json.dumps({"x": self.x, "y": self.y, "unit": self.unit, "axis": self.axis, "lines": lines})


def chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    unit: str = "",
    note: str = "",
    axis: str = "step",
) -> Chart | None:
    """Return a chart of lines over steps; None where no line has a finite value.

    Args:
      title: of the chart.
      lines: curves; values that are not finite are left out.
      levels: dashed lines.
      unit: of the values.
      note: a sentence below the chart.
      axis: what is across.
    """
    drawn = [line for line in map(_short, lines) if line.x]
    if not drawn:
        return None
    left, right = min(min(line.x) for line in drawn), max(max(line.x) for line in drawn)
    ends = [*(v for line in drawn for v in line.y), *(level.y for level in levels)]
    low, high = _range(min(ends), max(ends))
    right = right if right > left else left + 1
    return Chart(title, drawn, levels, unit, note, (left, right), (low, high), axis)


def metric_lines(rows: Rows, metrics: Sequence[tuple[str, str]], unit: str = "") -> list[Line]:
    """Return lines of `metrics`, (key, label) each, over steps, in percent if `unit` is; none without values."""
    lines, scale = [], 100.0 if unit == "%" else 1.0
    for color, (key, label) in enumerate(metrics):
        logged = [row for row in rows if isinstance(row.get(key), (int, float))]
        if logged:
            lines.append(Line(label, [r["step"] for r in logged], [scale * r[key] for r in logged], color))
    return lines


def term_chart(curve: Curve, rows: Rows, term: str) -> Chart | None:
    """Return the chart of a curve that the objective's term `term` declares; None where no row has its metrics."""
    lines = metric_lines(rows, [(f"{term}/{key}", label) for key, label in curve.lines], curve.unit)
    return chart(curve.title, lines, shown_levels(curve, rows, term), unit=curve.unit, note=curve.note)


def shown_levels(curve: Curve, rows: Rows, term: str) -> list[Level]:
    """Return the dashed lines of a curve, by the last of one or more rows."""
    levels, scale = [], 100.0 if curve.unit == "%" else 1.0
    for level in curve.levels:
        value = rows[-1].get(f"{term}/{level.value}") if isinstance(level.value, str) else level.value
        if value is not None:
            levels.append(Level(level.label, scale * value, below=level.alarm))
    return levels


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
    """Format a result: 12.5; "not a number" as `number` does."""
    return f"{value:{form}}" if math.isfinite(value) else number(value)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most `count` + 1 round numbers between low and high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Format the numbers of an axis, with as many digits as distinguish them: 33.25, 33.50, 33.75."""
    texts = [number(value) for value in values]
    if all(_same(float(text.replace(",", "")), value) for text, value in zip(texts, values, strict=True)):
        return texts
    digits = next(digits for digits in range(1, 16) if all(_same(round(value, digits), value) for value in values))
    return [f"{value:,.{digits}f}" for value in values]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


def _short(line: Line) -> Line:
    """Return the finite points of a line; means of equal parts where there are more than `POINTS`."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) > POINTS:
        x, y = ([float(part.mean()) for part in np.array_split(v, POINTS)] for v in (x, y))
        x = np.round(x)
    return line._replace(x=list(map(float, x)), y=list(map(float, y)))


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the range of the vertical axis: a margin around low and high, or from 0 where low is near 0."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.06 * high
    room = 0.08 * (high - low)
    return low - room, high + room


def of_runs(runs: Sequence[Run]) -> list[Chart]:
    """Return charts of all logged metrics: of one run, or with a line for each run."""
    several, drawn = len(runs) > 1, [_total(runs), *_curves(runs), *_evaluations(runs)]
    for key, title, unit in _LOGGED:
        lines = [line for run in runs for line in _lines(run, key, run.name if several else title, unit)]
        lines = lines if key != "data/bad_share" or any(any(line.y) for line in lines) else []
        drawn.append(chart(title, lines, unit=unit))
    return list(filter(None, drawn))


def _lines(run: Run, key: str, name: str, unit: str = "") -> list[Line]:
    """Return the line of a metric of a run, or none; of speeds without the first step, which compiles."""
    rows = run.record.training
    if key in ("samples_per_second", "mfu", "goodput"):
        rows = [row for row in rows if row.get("samples_per_second")]
    return [line._replace(color=run.color) for line in metric_lines(rows, ((key, name),), unit)]


def _total(runs: Sequence[Run]) -> Chart | None:
    """Return the chart of the sum of losses if all runs have the same sum; one term of weight 1 is its own chart."""
    objective = runs[0].record.objective
    if len({run.record.objective.formula for run in runs}) > 1 or list(objective.weights.values()) == [1.0]:
        return None
    lines = [line for run in runs for line in _lines(run, "loss", run.name if len(runs) > 1 else "weighted sum")]
    return chart("Loss", lines, unit="nats", note=f"{objective.formula}.")


def _curves(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield charts of the terms' curves: all metrics of a curve of one run, or one metric of several runs."""
    declared: dict[tuple[str, str], tuple[Curve, str]] = {}
    for run in runs:
        for term, own in run.record.objective.terms.items():
            for curve in own.report.curves():
                if len(runs) == 1 and run.record.training:
                    yield term_chart(curve, run.record.training, term)
                for key, label in curve.lines if len(runs) > 1 else ():
                    name = f"{curve.title}: {label}" if len(curve.lines) > 1 else curve.title
                    declared.setdefault((term, key), (curve, name))
    for (term, key), (curve, name) in declared.items():
        having = [run.record.training for run in runs if term in run.record.objective.terms and run.record.training]
        of_runs = [shown_levels(curve, rows, term) for rows in having]
        levels = of_runs[0] if of_runs and all(own == of_runs[0] for own in of_runs) else []
        lines = [line for run in runs for line in _lines(run, f"{term}/{key}", run.name, curve.unit)]
        yield chart(name, lines, levels, unit=curve.unit, note=curve.note)


def _evaluations(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield the first metric of each set that was evaluated at several steps: a chart, or one for each set."""
    points: dict[tuple[Key, str, str], dict[int, dict[float, float]]] = {}
    for run in runs:
        for step, results in run.record.evaluations:
            for row in tables.rows(results):
                metric, result = row.shown[0]
                key = ((row.family, row.name), metric.label, result.unit)
                points.setdefault(key, {}).setdefault(run.color, {})[step] = result.value
    short = labels(rows_of(runs))
    names = {run.color: run.name for run in runs}
    points = {key: of_runs for key, of_runs in points.items() if max(map(len, of_runs.values())) > 1}
    if len(runs) == 1:
        lines: dict[str, list[Line]] = {}
        for (key, label, unit), of_runs in points.items():
            own, drawn = of_runs[runs[0].color], lines.setdefault(unit, [])
            drawn.append(Line(f"{short[key]}, {label}", list(own), list(own.values()), len(drawn) % 8))
        yield from (chart("Evaluation during training", of_unit, unit=unit) for unit, of_unit in lines.items())
        return
    for (key, label, unit), of_runs in points.items():
        lines = [Line(names[color], list(own), list(own.values()), color) for color, own in of_runs.items()]
        yield chart(f"{short[key]}, {label}", lines, unit=unit)
