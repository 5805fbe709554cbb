"""Line charts: the lines of logged metrics, and the numbers on their axes. The template's macro `chart` draws them."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from xclip_jax.evaluators import tables
from xclip_jax.objectives import Curve
from xclip_jax.report.collect import Key, Record, Run, labels, rows_of

POINTS = 400  # at most in a line; longer lines are averaged
_LEARNING = (("lr", "Learning rate"), ("grad_norm", "Gradient norm"), ("samples_per_second", "Speed, samples/s"))
Rows = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: its name, steps and values, and the number of its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed line at y with a short name; `below` shades the area under it as an alarm."""

    name: str
    y: float
    below: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart with its ranges and ticks; `chart` makes it."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[Level]
    unit: str
    note: str
    x: tuple[float, float]
    y: tuple[float, float]

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
        text = f"{self.title}, steps {number(self.x[0])} to {number(self.x[1])}: {ranges}."
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
        return json.dumps({"x": self.x, "y": self.y, "unit": self.unit, "lines": lines})


def chart(
    title: str, lines: Sequence[Line], levels: Sequence[Level] = (), *, unit: str = "", note: str = ""
) -> Chart | None:
    """Return a chart of lines over steps; None where no line has a finite value.

    Args:
      title: of the chart.
      lines: curves; values that are not finite are left out.
      levels: dashed lines.
      unit: of the values.
      note: a sentence below the chart.
    """
    drawn = [line for line in map(_short, lines) if line.x]
    if not drawn:
        return None
    left, right = min(min(line.x) for line in drawn), max(max(line.x) for line in drawn)
    ends = [*(v for line in drawn for v in line.y), *(level.y for level in levels)]
    low, high = _range(min(ends), max(ends))
    right = right if right > left else left + 1
    return Chart(title, drawn, levels, unit, note, (left, right), (low, high))


def metric_lines(rows: Rows, metrics: Sequence[tuple[str, str]], *, scale: float = 1.0) -> list[Line]:
    """Return lines of `metrics`, (key, label) each, over steps, times `scale`; a metric without values has none."""
    lines = []
    for color, (key, label) in enumerate(metrics):
        logged = [row for row in rows if isinstance(row.get(key), (int, float))]
        if logged:
            lines.append(Line(label, [r["step"] for r in logged], [scale * r[key] for r in logged], color))
    return lines


def term_chart(curve: Curve, rows: Rows, term: str) -> Chart | None:
    """Return the chart of a curve that the objective's term `term` declares; None where no row has its metrics."""
    metrics = [(f"{term}/{key}", label) for key, label in curve.lines]
    lines = metric_lines(rows, metrics, scale=scale_of(curve))
    return chart(curve.title, lines, shown_levels(curve, rows, term), unit=curve.unit, note=curve.note)


def scale_of(curve: Curve) -> float:
    """Return the factor of the logged values of a curve: 100 for percent."""
    return 100.0 if curve.unit == "%" else 1.0


def shown_levels(curve: Curve, rows: Rows, term: str) -> list[Level]:
    """Return the dashed lines of a curve, by the last of one or more rows."""
    levels = []
    for level in curve.levels:
        value = rows[-1].get(f"{term}/{level.value}") if isinstance(level.value, str) else level.value
        if value is not None:
            levels.append(Level(level.label, scale_of(curve) * value, below=level.alarm))
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
    return dataclasses.replace(line, x=list(map(float, x)), y=list(map(float, y)))


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the range of the vertical axis: a margin around low and high, or from 0 where low is near 0."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.06 * high
    room = 0.08 * (high - low)
    return low - room, high + room


# The charts of one run, and of several runs over one another.


def of_run(record: Record) -> list[Chart]:
    """Return charts of all logged metrics; [] where no step is logged."""
    if not record.training:
        return []
    rows, objective = record.training, record.objective
    timed = [row for row in rows if row.get("samples_per_second")]  # the first step compiles
    unit = "items" if objective.labelled else "pairs"

    def one(title: str, key: str, label: str, rows: Rows = rows, unit: str = "") -> Chart | None:
        return chart(title, metric_lines(rows, ((key, label),), scale=100.0 if unit == "%" else 1.0), unit=unit)

    # With one term of weight 1 its own loss is the total.
    total = metric_lines(rows, (("loss", "weighted sum"),)) if list(objective.weights.values()) != [1.0] else []
    drawn = [
        chart("Loss", total, unit="nats", note=f"{objective.formula}."),
        *(term_chart(curve, rows, name) for name, own in objective.curves().items() for curve in own),
        chart("Evaluation during training", _evaluated(record), unit="%"),
        one("Learning rate", "lr", "learning rate"),
        one("Gradient norm", "grad_norm", "norm"),
        one("Parameter norm", "param_norm", "norm"),
        one("Speed", "samples_per_second", f"{unit} per second", timed, f"{unit}/s"),
        one("MFU", "mfu", "MFU", timed, "%"),
        one("Goodput", "goodput", "goodput", timed, "%"),
        one("Bad samples", "data/bad_share", "share", rows if rows[-1].get("data/bad") else (), "%"),
    ]
    return list(filter(None, drawn))


def _evaluated(record: Record) -> list[Line]:
    """Return the first metric of each set that was evaluated during training, with the final value if it has one."""
    evaluations = list(record.evaluations)
    if record.complete and not record.steps_of:
        evaluations.append((record.config.steps, record.results))
    rows = [(step, row) for step, results_of in evaluations for row in tables.rows(results_of)]
    points: dict[tuple[Key, str], dict[int, float]] = {}
    for step, row in rows:
        metric, result = row.shown[0]
        # results.jsonl has the last evaluation as well.
        points.setdefault(((row.family, row.name), metric.label), {}).setdefault(step, result.value)
    short = labels(row for _, row in rows)
    several = [(key, own) for key, own in points.items() if len(own) > 1 or not record.complete]
    return [
        Line(f"{short[key]}, {metric}", list(own), list(own.values()), color % 8)
        for color, ((key, metric), own) in enumerate(several)
    ]


def of_several(runs: Sequence[Run]) -> list[Chart]:
    """Return charts with a line for each run."""
    drawn = [*_compare_evaluations(runs), *_compare_losses(runs)]
    for key, title in _LEARNING:
        drawn.append(chart(title, [line for run in runs for line in _lines(run, key, first_step=2)]))  # 1 compiles
    return list(filter(None, drawn))


def _lines(run: Run, key: str, scale: float = 1.0, first_step: int = 0) -> list[Line]:
    """Return the line of a metric of a run, or none."""
    rows = [row for row in run.record.training if row["step"] >= first_step]
    return [dataclasses.replace(x, color=run.color) for x in metric_lines(rows, ((key, run.name),), scale=scale)]


def _compare_losses(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield charts of the terms' curves, one for each metric, and of the sum of losses if all runs have the same."""
    if len({run.record.objective.formula for run in runs}) == 1 and len(runs[0].record.objective.terms) > 1:
        yield chart("Loss", [line for run in runs for line in _lines(run, "loss")], unit="nats")
    of_metrics: dict[tuple[str, str], tuple[Curve, str]] = {}
    for run in runs:
        for term, own in run.record.objective.curves().items():
            for curve in own:
                for key, label in curve.lines:
                    name = f"{curve.title}: {label}" if len(curve.lines) > 1 else curve.title
                    of_metrics.setdefault((term, key), (curve, name))
    for (term, key), (curve, name) in of_metrics.items():
        having = [run.record.training for run in runs if term in run.record.objective.terms and run.record.training]
        of_runs = [shown_levels(curve, rows, term) for rows in having]
        levels = of_runs[0] if of_runs and all(own == of_runs[0] for own in of_runs) else []
        lines = [line for run in runs for line in _lines(run, f"{term}/{key}", scale_of(curve))]
        yield chart(name, lines, levels, unit=curve.unit, note=curve.note)


def _compare_evaluations(runs: Sequence[Run]) -> Iterator[Chart | None]:
    """Yield a chart for each set that was evaluated more than once during training."""
    points: dict[tuple[Key, str, str], dict[int, list[tuple[float, float]]]] = {}
    for run in runs:
        for step, results in run.record.evaluations:
            for row in tables.rows(results):
                metric, result = row.shown[0]
                of_runs = points.setdefault(((row.family, row.name), metric.label, result.unit), {})
                of_runs.setdefault(run.color, []).append((step, result.value))
    short = labels(rows_of(runs))
    for (key, label, unit), of_runs in points.items():
        if max(map(len, of_runs.values())) > 1:
            having = [run for run in runs if run.color in of_runs]
            lines = [Line(run.name, *zip(*of_runs[run.color], strict=True), run.color) for run in having]
            yield chart(f"{short[key]}, {label}", lines, unit=unit)
