"""The sections of the page that come from the run's files: head, results, training curves, config and versions."""

import json
from typing import Any

from xclip_jax.config import schema
from xclip_jax.evaluators import summary
from xclip_jax.report.chance import LEVEL, verdict
from xclip_jax.report.charts import Line, chart, number
from xclip_jax.report.markup import Section, esc, missing
from xclip_jax.report.metric_charts import metric_lines, term_chart
from xclip_jax.report.record import Record


def title(record: Record) -> str:
    """Title of the page."""
    name = record.objective.title
    return f"What {name} learned" if record.complete else f"What {name} has learned so far"


def head(record: Record, parameters: int | None) -> str:
    """The head of the page: title, best results, and facts of the run."""
    config, steps, batch = record.config, record.steps, record.config.data.batch
    done = f"{steps:,} steps" if steps == config.steps else f"{steps:,} of {config.steps:,} steps"
    return (
        f'<header><div><p class="eyebrow">xclip_jax run report</p><h1>{esc(title(record))}</h1>'
        f'<p class="lead">{done} of {batch:,} {record.items}, in <code>{esc(record.folder)}</code></p>'
        f"{_tiles(record)}{_facts(record, parameters)}</div></header>"
    )


def _tiles(record: Record) -> str:
    results, when = record.results, ""
    if not results and record.evaluations:
        step, results = record.evaluations[-1]
        when = f"at step {step:,}"
    tiles, short = [], summary.short_names(results)
    for family, row in summary.representatives(results).items():
        metric, result = row.shown[0]
        chance = f"{verdict(result) or 'chance'} ({result.chance:.1f}\u00a0%)" if result.chance is not None else ""
        details = ", ".join(filter(None, (short[row.name], chance, when)))
        unit = " <small>%</small>" if result.unit == "%" else ""
        tiles.append(
            f'<div class="card tile"><span class="name">{esc(family)}</span><b>{result.value:.1f}{unit}</b>'
            f"<span>{esc(metric.label)}</span><span>{_breakable(details)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _breakable(name: str) -> str:
    """Escaped, and with places where a long name of a set may be broken into lines."""
    return esc(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _facts(record: Record, parameters: int | None) -> str:
    config, environment, objective = record.config, record.environment, record.objective
    last = record.training[-1] if record.training else {}
    samples = sum(source.get("samples", 0) for source in record.sources)
    unit = "items" if objective.labelled else "pairs"
    facts = {
        "Objective": objective.title + (f", {objective.formula}" if len(objective.terms) > 1 else ""),
        "Image tower": config.model.tower("img").describe(),
        "Parameters": f"{parameters:,}" if parameters else "",
        f"Training {unit}": f"{samples:,}" if samples else "",
        f"{unit.capitalize()} seen": f"{last['samples']:,} ({last['epoch']:.1f} epochs)" if "epoch" in last else "",
        "Speed": f"{number(last['samples_per_second'])} {unit}/s" if last.get("samples_per_second") else "",
        "MFU": f"{last['mfu']:.1%}" if last.get("mfu") else "",
        "Model TFLOP/s": number(flops / 1e12) if (flops := last.get("model_flops_per_second")) else "",
        "Goodput": f"{last['goodput']:.1%}" if last.get("goodput") else "",
        "Bad samples": f"{record.bad:,}" if record.bad else "",
        "Skipped steps": f"{last['skipped_steps']:,.0f}" if last.get("skipped_steps") else "",
        "Devices": environment.get("devices", ""),
        "Began, UTC": f"{record.began:%Y-%m-%d %H:%M}",
        "Ended, UTC": f"{record.ended:%Y-%m-%d %H:%M}" if record.ended else "not yet",
        "Commit": environment.get("commit", "")[:12] + "-dirty" * environment.get("commit", "").endswith("-dirty"),
        "JAX, Python": f"{environment.get('versions', {}).get('jax', '?')}, {environment.get('python', '?')}",
        "Seed": config.seed,
        "Data": ", ".join(config.data.sources),
    }
    items = (
        f"<div{_LONG if len(str(value)) > 20 else ''}><dt>{esc(key)}</dt><dd>{esc(value)}</dd></div>"
        for key, value in facts.items()
        if value != ""
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


_LONG = ' class="long"'


def results(record: Record) -> Section:
    """The tables of the last evaluation."""
    tables = summary.tables(record.results)
    if not tables:
        reason = "The final evaluation has not run yet" if not record.complete else "The run has no evaluation set"
        remedy = f"evaluate with python -m xclip_jax.evaluate --checkpoint {record.folder} --suite NAME."
        return missing("results", "Results", f"{reason}; {remedy}")
    text = f"In percent, with chance levels in brackets. {_judged(record)}"
    if not record.complete:
        text += " From evaluation.json: the run is not complete."
    return Section("results", "Results", f"<p>{text}</p>{''.join(map(_table, tables))}")


def _judged(record: Record) -> str:
    """Sentences on which sets are above chance; "" where none can be tested."""
    sets: dict[str, list[str]] = {}
    for row in summary.rows(record.results):
        metric, result = row.shown[0]
        if judged := verdict(result):
            sets.setdefault(judged, []).append(f"{_breakable(row.name)} ({esc(metric.label)})")
    sentences = [f"{judged.capitalize()}: {', '.join(names)}." for judged, names in sorted(sets.items())]
    method = f"By {LEVEL:.0%} binomial intervals, which assume independent items of equal weight."
    return " ".join([*sentences, method]) if sentences else ""


def _table(table: summary.Table) -> str:
    heads = "".join(f'<th scope="col"{_text(form)}>{esc(name)}</th>' for name, form in table.columns if name)
    rows = []
    for name, cells in table.rows:
        shown: list[str] = []
        for (column, form), cell in zip(table.columns, cells, strict=True):
            if column:
                shown.append(f"<td{_text(form)}>{_breakable(cell)}")
            elif cell:  # a column without a name is in small print, after the cell that it belongs to
                shown[-1] += f" <small>{esc(cell)}</small>"
        more = ' class="more"' if name.startswith(" ") else ""
        rows.append(f'<tr{more}><th scope="row">{_breakable(name.strip())}</th>{"</td>".join(shown)}</td></tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{esc(table.title)}"><table><thead><tr>'
        f'<th scope="col">{esc(table.title)}</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _text(form: str) -> str:
    return ' class="text"' if form.startswith("<") else ""


def curves(record: Record) -> Section:
    """Charts of all logged metrics over steps."""
    if not record.training:
        return missing("curves", "Training", "metrics.jsonl has no step yet.")
    rows, objective = record.training, record.objective
    timed = [row for row in rows if row.get("samples_per_second")]  # the first step compiles
    unit = "items" if objective.labelled else "pairs"
    # With one term of weight 1 its own loss is the total.
    total = metric_lines(rows, (("loss", "weighted sum"),)) if list(objective.weights.values()) != [1.0] else []
    bad = metric_lines(rows, (("data/bad_share", "share"),), scale=100.0) if rows[-1].get("data/bad") else []
    drawn = [
        chart("Loss", total, unit="nats", note=f"{objective.formula}."),
        *(term_chart(curve, rows, name) for name, own in objective.curves().items() for curve in own),
        chart("Evaluation during training", _evaluated(record), unit="%"),
        chart("Learning rate", metric_lines(rows, (("lr", "learning rate"),))),
        chart("Gradient norm", metric_lines(rows, (("grad_norm", "norm"),))),
        chart("Parameter norm", metric_lines(rows, (("param_norm", "norm"),))),
        chart("Speed", metric_lines(timed, (("samples_per_second", f"{unit} per second"),)), unit=f"{unit}/s"),
        chart("MFU", metric_lines(timed, (("mfu", "MFU"),), scale=100.0), unit="%"),
        chart("Goodput", metric_lines(timed, (("goodput", "goodput"),), scale=100.0), unit="%"),
        chart("Bad samples", bad, unit="%"),
    ]
    text = "Training metrics of the logged steps. Point at a chart, or focus it and use the arrow keys, to read values."
    return Section("curves", "Training", f'<p>{text}</p><div class="grid2">{"".join(drawn)}</div>')


def _evaluated(record: Record) -> list[Line]:
    """The first metric of each set that was evaluated during training, with the final value where it has one."""
    evaluations = list(record.evaluations)
    if record.complete:
        evaluations.append((record.steps, record.results))
    points: dict[str, list[tuple[float, float]]] = {}
    for step, results_of in evaluations:
        for row in summary.rows(results_of):
            metric, result = row.shown[0]
            label = f"{row.name.rpartition('/')[2] or row.name}, {metric.label}"
            points.setdefault(label, []).append((step, result.value))
    several = {label: own for label, own in points.items() if len(own) > 1 or not record.complete}
    return [Line(label, *zip(*own, strict=True), color % 8) for color, (label, own) in enumerate(several.items())]


def about(record: Record) -> Section:
    """Command, versions and config, in elements that open."""
    environment = dict(record.environment)
    command = environment.pop("command", "")
    parts: list[tuple[str, Any]] = [
        ("Versions and machine", environment),
        ("All keys of the config", schema.to_dict(record.config)),
        ("Training data", record.sources),
    ]
    folded = "".join(
        f'<details><summary>{name}</summary><pre tabindex="0">{esc(json.dumps(content, indent=2, sort_keys=True))}'
        "</pre></details>"
        for name, content in parts
        if content
    )
    return Section("run", "This run", f"<p>Started by <code>{esc(command)}</code></p>{folded}")
