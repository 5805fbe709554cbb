"""The sections of the page that come from the run's files: head, results, training curves, config and versions."""

import json
import math
from typing import Any

from xclip_jax.config import schema
from xclip_jax.core.console import command
from xclip_jax.data import images
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import UNITS
from xclip_jax.report.chance import ABOVE, LEVEL, judge, judgements
from xclip_jax.report.charts import Line, chart, number, one_decimal
from xclip_jax.report.evaluations import Key, labels
from xclip_jax.report.markup import Section, breakable, esc, missing, verdict_pill, wide
from xclip_jax.report.metric_charts import metric_lines, term_chart
from xclip_jax.report.record import Record


def title(record: Record) -> str:
    """Title of the page."""
    name = record.objective.title
    return f"What {name} learned" if record.complete else f"What {name} has learned so far"


def head(record: Record, parameters: int | None) -> str:
    """The head of the page, HTML: title, best results, and facts of the run."""
    config, steps, batch = record.config, record.steps, record.config.data.batch
    done = f"{steps:,} steps" if steps == config.steps else f"{steps:,} of {config.steps:,} steps"
    return (
        f'<p class="eyebrow">xclip_jax run report</p><h1>{esc(title(record))}</h1>'
        f'<p class="lead">{done} of {batch:,} {record.items}, in <code>{esc(record.folder)}</code></p>'
        f"{_tiles(record)}{_facts(record, parameters)}"
    )


def _tiles(record: Record) -> str:
    tiles, short = [], tables.short_names(record.results)
    for family, row in tables.first_set_of_each_family(record.results).items():
        metric, result = row.shown[0]
        judged = judge(result)
        unit = result.unit if result.unit not in UNITS or result.unit == "%" else ""
        chance = f"chance {result.chance:.1f}\u00a0{unit or '%'}" if result.chance is not None else ""
        step = record.step_of(result)
        when = "" if step is None else f"at step {step:,}"
        details = ", ".join(filter(None, (chance, short[row.name], when)))
        unit = f" <small>{esc(unit)}</small>" if unit else ""
        value = one_decimal(result.value)
        value = f"{value}{unit}" if math.isfinite(result.value) else f"<small>{value}</small>"
        label = metric.label + (f", {LEVEL:.0%}: {judged}" if str(judged) else "")
        tiles.append(
            f'<div class="card tile"><span class="name">{esc(family)}</span><b>{value}</b>'
            f"<span>{esc(label)}</span>{verdict_pill(judged.verdict)}<span>{breakable(details)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}{_next(record)}</div>'


def _next(record: Record) -> str:
    """Return a tile with what to do now, for somebody whose first run this is."""
    run, verdicts = esc(record.folder), [judged.verdict for judged in judgements(record.results).values()]
    in_python = f"load the model in Python by <code>xclip_jax.load('{run}')</code>."
    if not record.complete:
        text = "The run is not complete. If it has stopped, the command that started it resumes it."
    elif any(verdicts) and ABOVE not in verdicts:
        text = f"No result is above chance; <code>{command('doctor')} {run}</code> says what to change."
    elif record.objective.labelled:
        text = f"To use it, {in_python}"
    else:
        text = f"Search your own images by words: <code>{command('serve')} {run} --images FOLDER</code>. Or {in_python}"
    return f'<div class="card tile next"><span class="name">What now</span><span>{text}</span></div>'


def _facts(record: Record, parameters: int | None) -> str:
    config, environment, objective = record.config, record.environment, record.objective
    last = record.training[-1] if record.training else {}
    samples = sum(source.get("samples", 0) for source in record.sources)
    transparent = max((source.get("transparent", 0) for source in record.sources), default=0)
    unit = "items" if objective.labelled else "pairs"
    facts = {
        "Objective": objective.title + (f", {objective.formula}" if len(objective.terms) > 1 else ""),
        "Image tower": config.model.tower("img").describe(),
        "Parameters": f"{parameters:,}" if parameters else "",
        f"Training {unit}": f"{samples:,}" if samples else "",
        "Transparent images": images.describe(transparent, config.data.background) if transparent else "",
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
    built = tables.build(record.results)
    if not built:
        reason = "The final evaluation has not run yet" if not record.complete else "The run has no evaluation set"
        remedy = f"evaluate with {command('evaluate')} --checkpoint {record.folder} --suite NAME."
        return missing("results", "Results", f"{reason}; {remedy}")
    text = f"In percent, with chance levels in brackets. {_method(record)}"
    if record.steps_of:
        text += " From evaluation.json and results.jsonl, the newest of each set"
        text += "." if record.complete else ": the run is not complete."
    return Section("results", "Results", f"<p>{text}</p>{''.join(_table(table, record) for table in built)}")


def _method(record: Record) -> str:
    """Sentences on how many sets are above chance, and on the intervals; "" where no set has one."""
    judged = [j for j in judgements(record.results).values() if str(j)]
    if not judged:
        return ""
    tested = [j.verdict for j in judged if j.verdict]
    counts = f"{tested.count(ABOVE)} of {len(tested)} sets are above chance. " if tested else ""
    methods = {
        "binomial, which assume independent items of equal weight": not all(j.resampled for j in judged),
        "bootstraps of per-example values": any(j.resampled for j in judged),
    }
    names = ", or ".join(name for name, used in methods.items() if used)
    own = ", or of the own metric that it names" * any(row.set_specific for row in tables.rows(record.results))
    return f"{counts}Intervals are of the first metric of a row{own}, at {LEVEL:.0%}: {names}."


def _table(table: tables.Table, record: Record) -> str:
    """A table, with the interval and the verdict of each row whose first metric has them, and steps before the last."""
    first = {name: row.shown[0][1] for name, row in tables.row_by_name(table, record.results).items()}
    judged = {name: judge(result) for name, result in first.items()}
    heads = "".join(f'<th scope="col"{_text(form)}>{esc(name)}</th>' for name, form in table.columns if name)
    shown_intervals = any(str(j) for j in judged.values())
    if shown_intervals:
        heads += f'<th scope="col">{LEVEL:.0%} interval</th><th scope="col" class="text">verdict</th>'
    if record.steps_of:
        heads += '<th scope="col">step</th>'
    rows = []
    for name, cells in table.rows:
        shown: list[str] = []
        for (column, form), cell in zip(table.columns, cells, strict=True):
            if column:
                shown.append(f"<td{_text(form)}>{breakable(number(math.nan) if cell == 'nan' else cell)}")
            elif cell:  # a column without a name is in small print, after the cell that it belongs to
                shown[-1] += f" <small>{esc(cell)}</small>"
        if shown_intervals:
            own = judged.get(name)
            shown += [f"<td>{own or ''}", f'<td class="text">{verdict_pill(own.verdict) if own else ""}']
        if record.steps_of:
            step = record.step_of(first[name]) if name in first else None
            shown.append("<td>" if step is None else f"<td>{step:,}")
        more = ' class="more"' if name.startswith(" ") else ""
        rows.append(f'<tr{more}><th scope="row">{breakable(name.strip())}</th>{"</td>".join(shown)}</td></tr>')
    return wide(
        table.title,
        f'<table><thead><tr><th scope="col">{esc(table.title)}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
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
