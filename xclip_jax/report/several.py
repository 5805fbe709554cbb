"""The page of several runs: their results, paired differences, curves over one another, and what they differ in."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xclip_jax.config import schema
from xclip_jax.core.console import command
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import Result
from xclip_jax.objectives import Curve
from xclip_jax.report import shell, side_by_side
from xclip_jax.report.chance import LEVEL, judge
from xclip_jax.report.charts import Line, chart, number, one_decimal
from xclip_jax.report.evaluations import Key, labels
from xclip_jax.report.examples import Examples
from xclip_jax.report.markup import Images, Section, breakable, esc, missing, verdict_pill, wide
from xclip_jax.report.metric_charts import metric_lines, shown_levels
from xclip_jax.report.record import Record

MOST_RUNS = 8  # as many as there are colours
_OWN = ("run", "log.", "checkpoint.", "eval.report")  # keys that change nothing that is compared
_LEARNING = (("lr", "Learning rate"), ("grad_norm", "Gradient norm"), ("samples_per_second", "Speed, samples/s"))


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the runs: its name on the page, the number of its colour, its files, and its model's predictions."""

    name: str
    color: int
    record: Record
    examples: Examples

    @property
    def label(self) -> str:
        """HTML of the name behind a dot in its colour."""
        return f'<span class="run c{self.color}">{breakable(self.name)}</span>'


def short_names(folders: Sequence[str]) -> list[str]:
    """Return as many last parts of each path as distinguish them.

    Raises:
      UserError: fewer than two, more than `MOST_RUNS`, or two that are the same.
    """
    parts = [folder.rstrip("/").split("/") for folder in folders]
    if not 2 <= len(parts) <= MOST_RUNS:
        raise UserError(f"{len(parts)} runs are named; a page of several shows 2 to {MOST_RUNS}.")
    if twice := [folder for i, folder in enumerate(folders) if parts[i] in parts[:i]]:
        raise UserError(f"run {twice[0]!r} is named twice; name different runs.")
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def render(runs: Sequence[Run], *, step: int | None = None) -> str:
    """Return the page of two or more runs.

    Args:
      runs: the first is the one that the others are compared with.
      step: of the evaluations that are paired; by default the newest that each run has.
    """
    images = Images()
    sections = [
        _results(runs),
        _differences(runs, step),
        side_by_side.predictions([(run.label, run.examples) for run in runs], images),
        side_by_side.searches([(run.label, run.examples) for run in runs], images),
        _curves(runs),
        _settings(runs),
    ]
    names = ", ".join(run.name for run in runs)
    folders = " ".join(str(run.record.folder) for run in runs)
    credits = dict.fromkeys(credit for run in runs for credit in run.examples.credits)
    notes = dict.fromkeys((*_note_on_pairs(runs), *(note for run in runs for note in run.examples.missing)))
    return shell.page(
        f"{len(runs)} runs: {names}",
        _head(runs),
        sections,
        images,
        notes=list(notes),
        footer=f"<p>Made by <code>{command('report')} {esc(folders)}</code>. Examples are drawn by seed "
        f"{runs[0].examples.seed}, not selected by hand.</p>{''.join(f'<p>{esc(credit)}</p>' for credit in credits)}",
    )


def _note_on_pairs(runs: Sequence[Run]) -> Iterator[str]:
    """A sentence where the pairs of the first run, which are shown, may be training pairs of others."""
    first, *rest = [(run.record.config.data.sources, run.record.config.data.holdout) for run in runs]
    others = [run.name for run, own in zip(runs[1:], rest, strict=True) if own != first]
    if others and (runs[0].examples.named or runs[0].examples.retrieved):
        yield (
            f"Held-out and training pairs, where shown, are those of {runs[0].name}; {', '.join(others)} learned from "
            "other data, which may contain the held-out ones."
        )


def _head(runs: Sequence[Run]) -> str:
    cards = []
    for run in runs:
        config, steps = run.record.config, run.record.steps
        done = f"{steps:,} steps" if steps == config.steps else f"{steps:,} of {config.steps:,} steps"
        objective, tower = run.record.objective, config.model.tower("img")
        cards.append(
            f'<div class="card tile c{run.color} striped"><span class="name">{breakable(run.name)}</span>'
            f"<b>{esc(objective.title)}</b><span>{esc(objective.formula)}</span>"
            f"<span>{done} of {config.data.batch:,} {run.record.items}</span><span>{esc(tower.describe())}</span>"
            f"<span>seed {config.seed}</span></div>"
        )
    return (
        f'<p class="eyebrow">xclip_jax comparison</p><h1>{len(runs)} runs side by side</h1><p class="lead">Differences '
        f'are against the first one, {esc(runs[0].name)}.</p><div class="tiles runs">{"".join(cards)}</div>'
    )


def _first_results(run: Run) -> dict[Key, tuple[str, Result]]:
    """{family and name of a row: label of its first metric, and its result}."""
    return {(row.family, row.name): (row.shown[0][0].label, row.shown[0][1]) for row in tables.rows(run.record.results)}


def _rows(runs: Sequence[Run]) -> list[tables.Row]:
    """Rows of all sets that runs have results of."""
    evaluations = [x for run in runs for x in (run.record.results, *(results for _, results in run.record.evaluations))]
    return [row for results in evaluations for row in tables.rows(results)]


def _results(runs: Sequence[Run]) -> Section:
    """A table with a row for each set and a column for each run."""
    of_runs = [_first_results(run) for run in runs]
    keys = list(dict.fromkeys(key for results in of_runs for key in results))
    if not keys:
        reason = f"no run has results yet; evaluate each with {command('evaluate')} --checkpoint RUN --suite NAME."
        return missing("results", "Results", reason)
    short, rows = labels(_rows(runs)), []
    for key in keys:
        own = [results.get(key) for results in of_runs]
        label, first = next(result for result in own if result)
        lower = first.unit == "rank"
        same = [pair is not None and _of_same_data(pair[1], first) for pair in own]
        equal = [pair[1].value for pair, is_same in zip(own, same, strict=True) if pair and is_same]
        values = list(filter(math.isfinite, equal))
        best = (min if lower else max)(values, default=math.nan) if len(set(values)) > 1 else math.nan
        cells = "".join(
            _cell(run, pair[1] if pair else None, best, is_same)
            for run, pair, is_same in zip(runs, own, same, strict=True)
        )
        level = "" if first.chance is None else f"{first.chance:.1f}"
        rows.append(
            f'<tr><th scope="row">{breakable(short[key])}<br><small>{esc(label)}</small></th>'
            f"<td>{level}</td>{cells}</tr>"
        )
    heads = "".join(f'<th scope="col">{run.label}</th>' for run in runs)
    table = (
        f'<table class="several"><thead><tr><th scope="col">set</th><th scope="col">chance</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    text = (
        f"The first metric of each set, with its {LEVEL:.0%} interval and its verdict against chance. The best value "
        "of a row is bold; whether it differs from the others is said below. A set of other data than the row's first "
        "has its own chance level."
    )
    if any(run.record.steps_of for run in runs):
        text += " Runs without a last evaluation have the newest result of each set, with its step."
    return Section("results", "Results", f"<p>{text}</p>{wide('Results of all runs', table)}")


def _of_same_data(a: Result, b: Result) -> bool:
    """Whether two results of a set are of equal data, as far as their number and hash say."""
    hashes = {a.protocol.split_hash, b.protocol.split_hash} - {""}
    return a.n == b.n and len(hashes) < 2


def _cell(run: Run, result: Result | None, best: float, same: bool) -> str:
    if result is None:
        return "<td><small>not evaluated</small></td>"
    judged, step = judge(result), run.record.step_of(result)
    value = one_decimal(result.value)
    value = f"<b>{value}</b>" if same and result.value == best else value
    value += "" if step is None else f" <small>step {step:,}</small>"
    if not same:
        value += " <small>other data" + ("" if result.chance is None else f", chance {result.chance:.1f}") + "</small>"
    return f"<td>{value}<br><small>{judged}</small><br>{verdict_pill(judged.verdict)}</td>"


def _differences(runs: Sequence[Run], step: int | None) -> Section:
    """Paired differences of each run to the first, set by set."""
    first, parts = runs[0], []
    for run in runs[1:]:
        refused: list[str] = []
        try:
            rows = tables.compare(str(first.record.folder), str(run.record.folder), step=step, refused=refused)
        except UserError as error:
            rows, refused = [], [str(error)]
        parts.append(f"<h3>{run.label} against {first.label}</h3>")
        if rows:
            short = tables.shorten([*(row.name for row in _rows(runs)), *(row["set"] for row in rows)])
            parts.append(wide(f"Differences of {run.name} to {first.name}", _difference_table(first, run, rows, short)))
        parts += [f'<p class="none">{esc(sentence)}</p>' for sentence in refused]
    text = (
        f"Paired by item, from the evaluation.json of both; bars are {LEVEL:.0%} bootstrap intervals of the "
        "difference, and to the right of the line is better. They are of the evaluation's items, not of the seed: two "
        "seeds of one recipe may differ by more."
    )
    return Section("differences", "Differences", f"<p>{text}</p>{''.join(parts)}")


def _difference_table(a: Run, b: Run, rows: Sequence[Mapping[str, Any]], short: Mapping[str, str]) -> str:
    # Ratios of ranks on a scale of their own, which grows to the right where the rank falls.
    placed = [_placed(row) for row in rows]
    ends = {"ratio" in row: 0.0 for row in rows}
    for row, values in zip(rows, placed, strict=True):
        ends["ratio" in row] = max([ends["ratio" in row], *(abs(v) for v in values if math.isfinite(v))])
    lines = []
    for row, values in zip(rows, placed, strict=True):
        ratio = "ratio" in row
        form = ".2f" if ratio else ".1f"
        change = f"x {row['ratio']:.2f}" if ratio else f"{row['difference']:+.1f}"
        change = change if math.isfinite(values[0]) else number(math.nan)
        a_and_b = "".join(
            f"<td>{row[side]:{form}}</td>" if math.isfinite(row[side]) else f"<td>{number(row[side])}</td>"
            for side in ("a", "b")
        )
        verdict = "better" if values[1] > 0 else "worse" if values[2] < 0 else "not distinguishable"
        known = math.isfinite(values[1])
        ends_form = ".2f" if ratio else "+.1f"
        interval = f"{row['low']:{ends_form}} to {row['high']:{ends_form}}" if known else ""
        lines.append(
            f'<tr><th scope="row">{breakable(short[row["set"]])}<br><small>{esc(row["metric"])}</small></th>'
            f"{a_and_b}<td>{change}</td>"
            f'<td class="bar">{_bar(values, ends[ratio])}</td><td>{interval}</td>'
            f'<td class="text">{verdict_pill(verdict) if known else "<small>no per-item values</small>"}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col"{style}>{text}</th>'
        for text, style in (
            (a.label, ""), (b.label, ""), ("difference", ""), ("worse | better", ' class="bar"'),
            (f"{LEVEL:.0%} interval", ""), ("verdict", ' class="text"'),
        )
    )  # fmt: skip
    return f'<table><thead><tr><th scope="col">set</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _placed(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Difference and the ends of its interval, NaN without one; more is better."""
    if "ratio" not in row:
        return row["difference"], row.get("low", math.nan), row.get("high", math.nan)
    low, high = (-math.log(row[key]) if key in row else math.nan for key in ("high", "low"))
    return -math.log(row["ratio"]), low, high


def _bar(values: tuple[float, float, float], end: float) -> str:
    """An interval around its value, on an axis from -end to end; the numbers are in the cells beside it."""
    value, low, high = (100 + 94 * v / end if end and math.isfinite(v) else math.nan for v in values)
    state = " above" if values[1] > 0 else " below" if values[2] < 0 else ""
    bar = ""
    if math.isfinite(low):
        bar = f'<rect x="{low:.1f}" y="9" width="{max(high - low, 0.5):.1f}" height="6" rx="3"/>'
    if math.isfinite(value):
        bar += f'<circle cx="{value:.1f}" cy="12" r="5"/>'
    return (
        f'<svg class="forest{state}" viewBox="0 0 200 24" width="200" height="24" aria-hidden="true">'
        f'<line x1="100" x2="100" y1="0" y2="24"/>{bar}</svg>'
    )


def _curves(runs: Sequence[Run]) -> Section:
    """Charts with a line for each run."""
    charts = [*_evaluated(runs), *_losses(runs)]
    for key, title in _LEARNING:
        # The first step compiles.
        lines = [line for run in runs for line in _lines(run, [r for r in run.record.training if r["step"] > 1], key)]
        charts.append(chart(title, lines))
    if not any(charts):
        return missing("curves", "Training", "no run has logged a step yet.")
    batches = {run.name: run.record.config.data.batch for run in runs}
    text = "The runs over one another. Point at a chart, or focus it and use the arrow keys, to read values."
    if len(set(batches.values())) > 1:
        sizes = ", ".join(f"{name} {batch:,}" for name, batch in batches.items())
        text += f" Batches differ, and so does what a step is: {sizes}."
    return Section("curves", "Training", f'<p>{esc(text)}</p><div class="grid2 over">{"".join(charts)}</div>')


def _lines(run: Run, rows: Sequence[Mapping[str, float]], key: str, scale: float = 1.0) -> list[Line]:
    """The line of a metric of a run, or none."""
    return [dataclasses.replace(x, color=run.color) for x in metric_lines(rows, ((key, run.name),), scale=scale)]


def _losses(runs: Sequence[Run]) -> Iterator[str]:
    """Charts of the terms' curves, a metric each, and of the sum of losses where it is the same one."""
    if len({run.record.objective.formula for run in runs}) == 1 and len(runs[0].record.objective.terms) > 1:
        yield chart("Loss", [line for run in runs for line in _lines(run, run.record.training, "loss")], unit="nats")
    curves: dict[tuple[str, str], tuple[Curve, str]] = {}
    for run in runs:
        for term, own in run.record.objective.curves().items():
            for curve in own:
                for key, label in curve.lines:
                    name = f"{curve.title}: {label}" if len(curve.lines) > 1 else curve.title
                    curves.setdefault((term, key), (curve, name))
    for (term, key), (curve, name) in curves.items():
        scale = 100.0 if curve.unit == "%" else 1.0
        having = [run.record.training for run in runs if term in run.record.objective.terms and run.record.training]
        of_runs = [shown_levels(curve, rows, term) for rows in having]
        levels = of_runs[0] if of_runs and all(own == of_runs[0] for own in of_runs) else []
        lines = [line for run in runs for line in _lines(run, run.record.training, f"{term}/{key}", scale)]
        yield chart(name, lines, levels, unit=curve.unit, note=curve.note)


def _evaluated(runs: Sequence[Run]) -> Iterator[str]:
    """A chart for each set that was evaluated more than once during training."""
    points: dict[tuple[Key, str, str], dict[int, list[tuple[float, float]]]] = {}
    for run in runs:
        for step, results in run.record.evaluations:
            for row in tables.rows(results):
                metric, result = row.shown[0]
                of_runs = points.setdefault(((row.family, row.name), metric.label, result.unit), {})
                of_runs.setdefault(run.color, []).append((step, result.value))
    short = labels(_rows(runs))
    for (key, label, unit), of_runs in points.items():
        if max(map(len, of_runs.values())) == 1:
            continue
        lines = [
            Line(run.name, *zip(*of_runs[run.color], strict=True), run.color) for run in runs if run.color in of_runs
        ]
        yield chart(f"{short[key]}, {label}", lines, unit=unit)


def _settings(runs: Sequence[Run]) -> Section:
    """A table of the config keys in which the runs differ, and of the speed and data of each."""
    configs = [schema.flatten(schema.to_dict(run.record.config)) for run in runs]
    keys = sorted({key for config in configs for key in config if not key.startswith(_OWN)})
    differing = {key: [config.get(key) for config in configs] for key in keys}
    differing = {key: values for key, values in differing.items() if any(value != values[0] for value in values)}
    facts = {
        "training samples": [sum(s.get("samples", 0) for s in run.record.sources) or None for run in runs],
        "steps logged": [run.record.steps for run in runs],
        "devices": [run.record.environment.get("devices") for run in runs],
        "commit": [str(run.record.environment.get("commit", ""))[:12] or None for run in runs],
    }
    rows = "".join(
        f'<tr><th scope="row">{breakable(key)}</th>{"".join(f"<td>{_value(value)}</td>" for value in values)}</tr>'
        for key, values in (facts | differing).items()
    )
    heads = "".join(f'<th scope="col">{run.label}</th>' for run in runs)
    table = (
        f'<table class="keys-of"><thead><tr><th scope="col">key</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )
    text = (
        f"All of {len(keys):,} config keys are equal."
        if not differing
        else f"{len(differing)} of {len(keys):,} config keys differ, without those of logs, checkpoints and folders."
    )
    return Section("settings", "What differs", f"<p>{text}</p>{wide('Config keys that differ', table)}")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, (int, float)):
        return number(value)
    return breakable(value if isinstance(value, str) else json.dumps(value))
