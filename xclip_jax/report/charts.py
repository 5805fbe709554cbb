"""Line charts: lines in an SVG that stretches, labels in HTML that do not; the page's script adds a crosshair."""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np

from xclip_jax.report.markup import esc

POINTS = 400  # at most in a line; longer lines are averaged
_WIDTH, _HEIGHT = 1000, 400  # units of the SVG


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: its name, steps and values, and the number of its colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int


@dataclasses.dataclass(frozen=True)
class Level:
    """A dashed line at y, with a short name beside the chart; `below` shades the area under it as an alarm."""

    name: str
    y: float
    below: bool = False


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


def one_decimal(value: float) -> str:
    """Format a result: 12.5; "not a number" as `number` does."""
    return f"{value:.1f}" if math.isfinite(value) else number(value)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers between low and high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Format the numbers of an axis, with as many digits as they need to be told apart: 33.25, 33.50, 33.75."""
    texts = [number(value) for value in values]
    if all(_same(float(text.replace(",", "")), value) for text, value in zip(texts, values, strict=True)):
        return texts
    digits = next(digits for digits in range(1, 16) if all(_same(round(value, digits), value) for value in values))
    return [f"{value:,.{digits}f}" for value in values]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


def chart(title: str, lines: Sequence[Line], levels: Sequence[Level] = (), *, unit: str = "", note: str = "") -> str:
    """HTML figure of curves over training steps; "" without a finite value."""
    drawn = [short for short in map(_short, lines) if len(short.x)]
    if not drawn:
        return ""
    x = [v for line in drawn for v in line.x]
    y = [v for line in drawn for v in line.y] + [level.y for level in levels]
    left, right = min(x), max(x)
    low, high = _range(min(y), max(y))
    right = right if right > left else left + 1

    def place(px: float, py: float) -> tuple[float, float]:
        return (px - left) / (right - left), (py - low) / (high - low)

    shapes, labels = [], []
    of_values, of_steps = ticks(low, high, 5), ticks(left, right, 5)
    for tick, text in zip(of_values, tick_labels(of_values), strict=True):
        height = place(left, tick)[1]
        shapes.append(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{_down(height)}" y2="{_down(height)}"/>')
        labels.append(f'<span class="y" style="bottom:{100 * height:.1f}%">{text}</span>')
    for tick, text in zip(of_steps, tick_labels(of_steps), strict=True):
        labels.append(f'<span class="x" style="left:{100 * place(tick, low)[0]:.1f}%">{text}</span>')
    for level in levels:
        height = place(left, level.y)[1]
        if level.below:
            area = f'y="{_down(height)}" height="{_HEIGHT * height:.1f}"'
            shapes.append(f'<rect class="zone" x="0" width="{_WIDTH}" {area}/>')
        shapes.append(f'<line class="level" x1="0" x2="{_WIDTH}" y1="{_down(height)}" y2="{_down(height)}"/>')
        labels.append(f'<span class="mark" style="bottom:{100 * height:.1f}%">{esc(level.name)}</span>')
    for line in drawn:
        points = " ".join(
            f"{_WIDTH * px:.1f},{_down(py)}" for px, py in (place(*xy) for xy in zip(line.x, line.y, strict=True))
        )
        shapes.append(f'<polyline class="c{line.color}" points="{points}"/>')
        if len(line.x) == 1:
            px, py = place(line.x[0], line.y[0])
            labels.append(f'<i class="dot c{line.color}" style="left:{100 * px:.1f}%;bottom:{100 * py:.1f}%"></i>')
    legend = "".join(f'<li class="c{line.color}">{esc(line.name)}</li>' for line in drawn)
    data = {
        "x": [left, right],
        "y": [low, high],
        "unit": unit,
        "lines": [{"name": z.name, "color": z.color, "x": z.x, "y": [_rounded(v) for v in z.y]} for z in drawn],
    }
    ranges = "; ".join(f"{z.name} from {number(z.y[0])} to {number(z.y[-1])}" for z in drawn)
    description = f"{title}, steps {number(left)} to {number(right)}: {ranges}."
    if levels:
        description += f" Lines at {', '.join(f'{level.name} ({number(level.y)})' for level in levels)}."
    return (
        f'<figure class="chart" tabindex="0" role="group" aria-label="{esc(description)} Arrow keys read '
        f'values." data-chart="{esc(json.dumps(data))}"><figcaption><b>{esc(title)}</b>'
        f'{f" <small>{esc(unit)}</small>" if unit else ""}<ul class="legend">{legend}</ul></figcaption>'
        f'<div class="plot{" marked" if levels else ""}">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(shapes)}</svg>{''.join(labels)}</div>{f'<p>{esc(note)}</p>' if note else ''}</figure>"
    )


def _short(line: Line) -> Line:
    """The finite points of a line; means of equal parts where there are more than `POINTS`."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) > POINTS:
        x, y = ([float(part.mean()) for part in np.array_split(v, POINTS)] for v in (x, y))
        x = np.round(x)
    return dataclasses.replace(line, x=list(map(float, x)), y=list(map(float, y)))


def _range(low: float, high: float) -> tuple[float, float]:
    """Range of the vertical axis: a margin around low and high, or from 0 where low is near 0."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.06 * high
    room = 0.08 * (high - low)
    return low - room, high + room


def _down(share: float) -> str:
    return f"{_HEIGHT * (1 - share):.1f}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
