"""Markdown tables and SVG charts of a study's records."""

import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath

from studies import verdicts
from studies.declaration import Measure
from studies.matrix import Matrix
from studies.statistics import MIN_SEEDS, Estimate, estimate, paired, unpaired
from xclip_jax.core.storage import write_whole
from xclip_jax.report.charts import tick_labels, ticks

# Okabe and Ito's colours, distinguishable by the colour-blind, without black and yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
WIDTH = 720
RIGHT = 28
TOP = 64
BOTTOM = 44


def write(path: pathlib.Path, lines: Sequence[str], charts: Mapping[str, str]) -> None:
    """Write a page, and its charts {name: SVG} as NAME.svg in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, svg in charts.items():
        write_whole(epath.Path(path.parent / f"{name}.svg"), svg)
    write_whole(epath.Path(path), "\n".join(lines).rstrip() + "\n")


# --- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines), ""]


def estimate_text(value: Estimate | None, measure: Measure, *, difference: bool = False) -> str:
    """Return "12.3 [11.0, 13.6]", for a difference "+1.2 [+0.4, +2.0]", or of a ratio "x 1.10 [1.02, 1.19]".

    Fewer than `MIN_SEEDS` runs have no interval: "12.3 (n = 2)".
    """
    if value is None:
        return "-"
    form = "+.1f" if difference else ".1f"
    factor = ""
    if measure.ratio:
        value = value.mapped(math.exp)
        form = ".2f"
        factor = "x " if difference else ""
    interval = f"(n = {value.n})" if value.n < MIN_SEEDS else f"[{value.low:{form}}, {value.high:{form}}]"
    return f"{factor}{value.mean:{form}} {interval}"


def runs_text(matrix: Matrix, name: str) -> str:
    """Return "5", "3 of 5" or "5, 1 diverged"."""
    arm = matrix.study.arm(name)
    records = matrix.finished(name)
    planned = len(arm.seeds) if arm else 0
    count = str(planned) if len(records) == planned else f"{len(records)} of {planned}"
    diverged = sum(bool(record.error) for record in records.values())
    return f"{count}, {diverged} diverged" if diverged else count


def title_of(matrix: Matrix, name: str) -> str:
    """Return an arm's title, or its name if it is not declared yet."""
    arm = matrix.study.arm(name)
    return arm.title if arm else name


def arms(matrix: Matrix, names: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Return a table of arms by measures, means over seeds with 95 % t-intervals."""
    rows = []
    for name in names:
        row = [title_of(matrix, name), runs_text(matrix, name)]
        for measure in measures:
            values = list(matrix.values(name, measure).values())
            row.append(estimate_text(estimate(values) if values else None, measure))
        rows.append(row)
    return table(["arm", "runs", *(measure.label for measure in measures)], rows)


def differences(
    matrix: Matrix, head: str, pairs: Mapping[str, tuple[str, str]], measures: Sequence[Measure]
) -> list[str]:
    """Return a table of differences, paired by seed, with a row for each {title: (arm, baseline)}."""
    rows = []
    for title, (name, baseline) in pairs.items():
        found = [paired(matrix.values(name, measure), matrix.values(baseline, measure)) for measure in measures]
        texts = [estimate_text(d, measure, difference=True) for d, measure in zip(found, measures, strict=True)]
        rows.append([title, *texts])
    return table([head, *(measure.label for measure in measures)], rows)


def against_each(matrix: Matrix, head: str, name: str, others: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Return a table of an arm minus each of `others`, whose intervals have one variance and hold together."""
    rows = [[title_of(matrix, other)] for other in others]
    for measure in measures:
        values = [list(matrix.values(arm, measure).values()) for arm in (name, *others)]
        for row, of_other in zip(rows, values[1:], strict=True):
            found = unpaired(values[:1], [of_other], values, len(others))
            row.append(estimate_text(found, measure, difference=True))
    return table([head, *(measure.label for measure in measures)], rows)


def claims(matrix: Matrix) -> list[str]:
    """Return the rule, and for each claim its verdict and a table of its parts."""
    lines = [verdicts.RULE, ""]
    for number, claim in enumerate(matrix.study.claims, 1):
        judged = verdicts.judge(matrix, claim)
        lines += [f"### {number}. {claim.text}", "", f"**{judged.verdict.capitalize()}.**", ""]
        rows = []
        for part in judged.parts:
            d = part.difference
            numbers = ["-", "-", "-", "-", "-"]
            if d is not None:
                p = (f"{value:.4f}" for value in (part.p, part.p_holm, part.p_against_holm, d.p_flip))
                numbers = [f"{part.agreeing} of {d.n}", *p]
            found = (d, verdicts.unpaired_difference(matrix, part.part))
            texts = [estimate_text(x, matrix.study.measure(part.part.measure), difference=True) for x in found]
            rows.append([part.part.text, *texts, *numbers, part.verdict])
        head = ["part", "difference", "without pairing", "seeds that agree", "p", "p, Holm", "p against, Holm"]
        head += ["p, sign flip", "verdict"]
        lines += table(head, rows)
    return lines


def missing(matrix: Matrix) -> list[str]:
    """Return a sentence, and a table of arms with missing runs."""
    left = matrix.missing()
    if not left:
        return ["All runs of the declared arms are finished.", ""]
    rows = [[title_of(matrix, name), f"`{name}`", str(number)] for name, number in left.items()]
    return [f"**{sum(left.values())} runs are missing.**", "", *table(["arm", "name", "missing runs"], rows)]


# --- charts


class _Plot:
    """An SVG; `x` and `y` place values."""

    def __init__(self, title: str, x: Sequence[float], y: Sequence[float], height: int, left: int) -> None:
        self.spans = {"x": (min(x), max(x)), "y": (min(y), max(y))}
        for axis, (low, high) in self.spans.items():
            if low == high:
                self.spans[axis] = (low - 1, high + 1)
        self.height = height
        self.left = left
        ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        self.parts = [f"<title>{html.escape(title)}</title>", ground]
        self.text(12, 24, title)

    def x(self, value: float) -> float:
        low, high = self.spans["x"]
        return self.left + (WIDTH - self.left - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.spans["y"]
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], color: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')

    def legend(self, names: Sequence[str]) -> None:
        widths = [28 + 7.2 * len(name) for name in names]
        x = max(float(RIGHT), min(float(self.left), WIDTH - RIGHT - sum(widths)))
        for name, width, color in zip(names, widths, COLORS, strict=False):
            self.dot(x, 44, color)
            self.text(x + 9, 48, name)
            x += width

    def grid(self, axis: str, label: str) -> None:
        values = ticks(*self.spans[axis], 8)
        for tick, text in zip(values, tick_labels(values), strict=True):
            color = "#888888" if tick == 0 else "#dddddd"
            if axis == "x":
                self.line([(self.x(tick), TOP), (self.x(tick), self.height - BOTTOM)], color)
                self.text(self.x(tick), self.height - BOTTOM + 16, text, "middle")
            else:
                self.line([(self.left, self.y(tick)), (WIDTH - RIGHT, self.y(tick))], color)
                self.text(self.left - 8, self.y(tick) + 4, text, "end")
        self.text(WIDTH - RIGHT, self.height - 8 if axis == "x" else 24, label, "end")

    def render(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" role="img" font-family="sans-serif" font-size="13" fill="#222222"'
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *self.parts, "</svg>"]) + "\n"


def chart_of_differences(title: str, groups: Mapping[str, Mapping[str, Estimate]], label: str) -> str | None:
    """Return a chart of differences {group: {name: difference}} and intervals, or None without any; `label`: unit."""
    known = {group: {k: e for k, e in rows.items() if e.n >= MIN_SEEDS} for group, rows in groups.items()}
    known = {group: rows for group, rows in known.items() if rows}
    drawn = [e for rows in known.values() for e in rows.values()]
    if not drawn:
        return None
    names = list(dict.fromkeys(name for rows in known.values() for name in rows))
    height = TOP + BOTTOM + 14 * len(known) + 17 * len(drawn)
    ends = [0.0, *(e.low for e in drawn), *(e.high for e in drawn)]
    plot = _Plot(title, ends, (0, 1), height, 24 + 8 * max(map(len, known)))
    plot.legend(names)
    plot.grid("x", label)
    y = TOP + 14.0
    for group, rows in known.items():
        plot.text(12, y + 4, group)
        for name, e in rows.items():
            color = COLORS[names.index(name) % len(COLORS)]
            plot.dot(plot.x(e.mean), y, color)
            plot.line([(plot.x(e.low), y), (plot.x(e.high), y)], color)
            y += 17
        y += 14
    return plot.render()


def chart_of_curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str | None:
    """Return a chart of curves {name: (step, value) points}, or None without points."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    plot = _Plot(title, [0.0, *(x for x, _ in points)], [y for _, y in points], 400, 64)
    plot.legend(list(lines))
    plot.grid("y", label)
    plot.grid("x", "step")
    for line, color in zip(lines.values(), COLORS, strict=False):
        plot.line([(plot.x(x), plot.y(y)) for x, y in line], color)
    return plot.render()
