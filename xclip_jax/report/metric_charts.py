"""Charts of logged metrics, and of those that the terms of an objective declare."""

from collections.abc import Mapping, Sequence

from xclip_jax.objectives import Curve
from xclip_jax.report.charts import Level, Line, chart

Rows = Sequence[Mapping[str, float]]


def metric_lines(rows: Rows, metrics: Sequence[tuple[str, str]], *, scale: float = 1.0) -> list[Line]:
    """Lines of `metrics`, (key, label) each, over steps, times `scale`; those that no row has are left out."""
    lines = []
    for color, (key, label) in enumerate(metrics):
        logged = [row for row in rows if isinstance(row.get(key), (int, float))]
        if logged:
            lines.append(Line(label, [r["step"] for r in logged], [scale * r[key] for r in logged], color))
    return lines


def term_chart(curve: Curve, rows: Rows, term: str) -> str:
    """Figure of a curve of the objective's term `term`; "" where no row has its metrics."""
    scale = 100.0 if curve.unit == "%" else 1.0
    metrics = [(f"{term}/{key}", label) for key, label in curve.lines]
    lines = metric_lines(rows, metrics, scale=scale)
    return chart(curve.title, lines, shown_levels(curve, rows, term), unit=curve.unit, note=curve.note)


def shown_levels(curve: Curve, rows: Rows, term: str) -> list[Level]:
    """The dashed lines of a curve, by the last of one or more rows."""
    scale = 100.0 if curve.unit == "%" else 1.0
    levels = []
    for level in curve.levels:
        value = rows[-1].get(f"{term}/{level.value}") if isinstance(level.value, str) else level.value
        if value is not None:
            levels.append(Level(level.label, scale * value, below=level.alarm))
    return levels
