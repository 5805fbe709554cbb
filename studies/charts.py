"""Charts of a study as SVG files: means with their intervals over levels, curves over steps, differences in groups."""

import html
import math
from collections.abc import Mapping, Sequence

from studies import tables
from studies.declaration import Measure
from studies.matrix import Snapshot
from studies.statistics import MIN_SEEDS, Estimate
from studies.verdicts import difference
from xclip_jax.report.charts import tick_labels, ticks

# Okabe and Ito's colours, which the colour-blind can tell apart; black and yellow are left out.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 400, 64, 28, 64, 56


class _Plot:
    """An SVG with axes; data are placed by `x` and `y`."""

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float], height: int = _HEIGHT) -> None:
        self._x, self._y, self.height, self._title = x, y, height, title
        self.parts: list[str] = []
        self.text(12, 24, title, size=16, weight="bold")

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.height - _BOTTOM - (self.height - _TOP - _BOTTOM) * (value - low) / (high - low)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal"
    ) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}">'
            f"{html.escape(text)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], color: str, *, width: float = 2, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')

    def grid(self, label: str) -> None:
        """Horizontal lines with their values, and what these are."""
        values = ticks(*self._y, 8)
        for tick, text in zip(values, tick_labels(values), strict=True):
            color = "#888888" if abs(tick) < 1e-12 else "#dddddd"
            self.line([(_LEFT, self.y(tick)), (_WIDTH - _RIGHT, self.y(tick))], color, width=1)
            self.text(_LEFT - 8, self.y(tick) + 4, text, anchor="end")
        if label:
            self.text(_WIDTH - _RIGHT, 24, label, anchor="end")

    def legend(self, names: Sequence[str]) -> None:
        """Dots with names; a name without anything to show is "", and keeps its color."""
        x, y = float(_LEFT), 42
        for i, name in enumerate(names):
            width = 28 + 7.2 * len(name)
            if name and x + width > _WIDTH:
                x, y = float(_LEFT), y + 17
            if name:
                self.dot(x, y, COLORS[i % len(COLORS)])
                self.text(x + 9, y + 4, name)
                x += width

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.height}" role="img" '
            f'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif" fill="#222222">'
            f"<title>{html.escape(self._title)}</title>"
        )
        ground = f'<rect width="{_WIDTH}" height="{self.height}" fill="#ffffff"/>'
        return "\n".join([head, ground, *self.parts, "</svg>"]) + "\n"


def _has_interval(e: Estimate) -> bool:
    return e.n >= MIN_SEEDS and math.isfinite(e.low)


def _ends(e: Estimate) -> tuple[float, ...]:
    """What is drawn of an estimate: its mean, and its interval."""
    return (e.mean, e.low, e.high) if _has_interval(e) else (e.mean,)


def _span(values: Sequence[float]) -> tuple[float, float] | None:
    """Smallest and largest finite value with some room, or None without values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = 0.08 * (high - low) or abs(high) / 2 or 1.0
    return low - room, high + room


def over_levels(
    title: str, axis: str, levels: Sequence[str], lines: Mapping[str, Sequence[Estimate | None]], label: str = ""
) -> str | None:
    """Return a chart of means with intervals at each level, or None where there is nothing to draw.

    Args:
      title, axis, label: of the chart, of the levels and of the values.
      levels: along the axis, evenly spaced.
      lines: {name: an estimate for each level, None where there are no runs}.
    """
    drawn = [estimate for line in lines.values() for estimate in line if estimate]
    span = _span([value for e in drawn for value in _ends(e)])
    if span is None:
        return None
    plot = _Plot(title, (-0.5, len(levels) - 0.5), span)
    plot.grid(label)
    plot.legend([name if any(line) else "" for name, line in lines.items()])
    for i, level in enumerate(levels):
        plot.text(plot.x(i), plot.height - _BOTTOM + 20, level, anchor="middle")
    plot.text(plot.x((len(levels) - 1) / 2), plot.height - 12, axis, anchor="middle")
    for number_of_line, line in enumerate(lines.values()):
        color = COLORS[number_of_line % len(COLORS)]
        shift = 0.06 * (number_of_line - (len(lines) - 1) / 2)  # intervals of two lines side by side
        points = [(plot.x(i + shift), e) for i, e in enumerate(line) if e]
        plot.line([(x, plot.y(e.mean)) for x, e in points], color)
        for x, e in points:
            plot.dot(x, plot.y(e.mean), color)
            if _has_interval(e):
                plot.line([(x, plot.y(e.low)), (x, plot.y(e.high))], color)
    return plot.render()


def over_steps(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str = "",
    level: tuple[str, float] | None = None,
) -> str | None:
    """Return a chart of curves {name: (step, value) points} with a dashed level, or None without points."""
    points = [point for line in lines.values() for point in line]
    span = _span([y for _, y in points] + ([level[1]] if level and points else []))
    if span is None:
        return None
    right = max(x for x, _ in points)
    plot = _Plot(title, (0, right if right > 0 else 1), span)
    plot.grid(label)
    plot.legend([name if any(line) else "" for name, line in lines.items()])
    values = ticks(0, max(right, 1), 5)
    for tick, text in zip(values, tick_labels(values), strict=True):
        plot.text(plot.x(tick), plot.height - _BOTTOM + 20, text, anchor="middle")
    plot.text(plot.x(right / 2), plot.height - 12, "step", anchor="middle")
    if level:
        plot.line([(_LEFT, plot.y(level[1])), (_WIDTH - _RIGHT, plot.y(level[1]))], "#888888", width=1.5, dash="6 4")
        plot.text(_WIDTH - _RIGHT, plot.y(level[1]) - 6, level[0], anchor="end")
    for i, line in enumerate(lines.values()):
        plot.line([(plot.x(x), plot.y(y)) for x, y in line], COLORS[i % len(COLORS)])
    return plot.render()


def in_groups(title: str, groups: Mapping[str, Mapping[str, Estimate]], label: str = "") -> str | None:
    """Return a chart of differences around a line at zero, or None without any.

    Args:
      title, label: of the chart and of its unit.
      groups: {group: {name: difference}}; a name has one color in all groups.
    """
    drawn = {group: rows for group, rows in groups.items() if rows}
    names = list(dict.fromkeys(name for rows in drawn.values() for name in rows))
    span = _span([0.0, *(v for rows in drawn.values() for e in rows.values() for v in _ends(e))])
    if not drawn or span is None:
        return None
    step, gap = 17, 14
    top = _TOP + 18 * ((len(names) - 1) // 2)  # two names a line of the legend
    height = top + 40 + sum(step * len(rows) + gap for rows in drawn.values())
    low, high = span
    share = 7.4 * max(map(len, drawn)) / (_WIDTH - _LEFT - _RIGHT)
    plot = _Plot(title, (low - (high - low) * share / max(1 - share, 0.2), high), (0, 1), height)
    plot.text(_WIDTH - _RIGHT, 24, label, anchor="end")
    for i, name in enumerate(names):
        x, y = _LEFT + 300 * (i % 2), 44 + 18 * (i // 2)
        plot.dot(x, y, COLORS[i % len(COLORS)])
        plot.text(x + 9, y + 4, name)
    values = ticks(low, high, 7)
    for tick, text in zip(values, tick_labels(values), strict=True):
        color = "#888888" if abs(tick) < 1e-12 else "#dddddd"
        plot.line([(plot.x(tick), top), (plot.x(tick), height - 34)], color, width=1)
        plot.text(plot.x(tick), height - 14, text, anchor="middle")
    y = top + gap / 2
    for group, rows in drawn.items():
        plot.text(12, y + step * len(rows) / 2 + 4, group)
        for name, e in rows.items():
            color = COLORS[names.index(name) % len(COLORS)]
            plot.dot(plot.x(e.mean), y + step / 2, color)
            if _has_interval(e):
                plot.line([(plot.x(e.low), y + step / 2), (plot.x(e.high), y + step / 2)], color)
            y += step
        y += gap
    return plot.render()


# --- the charts of a study

CURVES = (
    ("contrastive_loss", "Contrastive loss", "nats", ("clip/loss",), "clip/ln_b"),
    ("mutual_information", "Mutual information of images and clusters", "nats", ("nclip/mutual_information_img",), ""),
)


def of_study(snapshot: Snapshot) -> dict[str, str]:
    """{file name: SVG} of all charts that have something to show."""
    study = snapshot.study
    made: dict[str, str | None] = {}
    title = f"Difference from {study.arm(study.baseline).title}, percentage points"
    made["finding"] = in_groups(title, _finding(snapshot), "mean over seeds, 95 %")
    made["weights"] = _weights(snapshot, title)
    for dose in (dose for dose in study.doses if tables.compared(snapshot, dose)):
        measure = study.measure(dose.measures[0])
        lines = {name: [_shown_mean(snapshot, arm, measure) for arm in arms] for name, arms in dose.lines.items()}
        made[f"dose_{dose.name}"] = over_levels(dose.title, dose.axis, dose.levels, lines, f"{measure.label}, %")
    for name, title, unit, metrics, level in CURVES:
        made[name] = _curve(snapshot, title, unit, metrics, level)
    return {name: svg for name, svg in made.items() if svg}


def _finding(snapshot: Snapshot) -> dict[str, dict[str, Estimate]]:
    """{measure: {arm: difference from the baseline}} of `Study.shown`."""
    study, groups = snapshot.study, {}
    arms = [arm for name in study.shown[0] if (arm := snapshot.choice(name))]
    for measure in map(study.measure, study.shown[1]):
        pairs = {arm: difference(snapshot, arm, study.baseline, measure) for arm in arms}
        groups[measure.label] = {study.arm(arm).title: d for arm, d in pairs.items() if d}
    return groups


def _weights(snapshot: Snapshot, title: str) -> str | None:
    """Differences from the baseline over the weight of a term, a line a measure."""
    study, lines = snapshot.study, {}
    for measure in map(study.measure, study.shown[1]):
        line = [difference(snapshot, arm, study.baseline, measure) for arm in study.weights.values()]
        lines[measure.label] = [Estimate(0.0, math.nan, math.nan, 1), *line] if any(line) else []
    return over_levels(title, "weight of nCLIP, spaced evenly", ["0", *study.weights], lines, "mean over seeds, 95 %")


def _shown_mean(snapshot: Snapshot, arm: str, measure: Measure) -> Estimate | None:
    of_mean = tables.mean_of(snapshot, arm, measure)
    return of_mean.mapped(math.exp) if of_mean and measure.ratio else of_mean


def _curve(snapshot: Snapshot, title: str, unit: str, metrics: Sequence[str], level: str) -> str | None:
    """Means over seeds of a metric of the core's runs, at the steps that all of an arm's runs have."""
    lines: dict[str, list[tuple[float, float]]] = {}
    dashed = None
    for arm in snapshot.study.of_section("core"):
        curves = [record.curve for record in snapshot.finished(arm.name).values() if not record.error]
        metric = next((m for m in metrics if any(m in curve for curve in curves)), None)
        points: dict[float, list[float]] = {}
        for curve in curves:
            for step, value in zip(curve.get("step", ()), curve.get(metric or "", ()), strict=False):
                if step is not None and value is not None:
                    points.setdefault(step, []).append(value)
            if level and curve.get(level) and curve[level][-1] is not None:
                dashed = ("ln b", float(curve[level][-1] or 0))
        common = {step: values for step, values in points.items() if len(values) == len(curves)}
        lines[arm.title] = [(step, sum(values) / len(values)) for step, values in sorted(common.items())]
    return over_steps(title, lines, unit, dashed)
