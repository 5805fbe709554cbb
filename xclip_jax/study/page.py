"""The page of a study, study.md with its charts in study/, written from the run files alone."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from xclip_jax.storage import write_whole
from xclip_jax.study import charts, conclusions, provenance, similarities, verdicts
from xclip_jax.study.declaration import Arm, Measure, Study
from xclip_jax.study.markdown import (
    difference_text,
    estimate_text,
    mean_of,
    rows_of,
    runs_text,
    table,
    titles_of,
)
from xclip_jax.study.matrix import Snapshot
from xclip_jax.study.schedule import training_seconds
from xclip_jax.study.statistics import Difference, Estimate

MADE = "Made by `{command} --page` from the files in `docs/{page}/runs`; a test holds it current."
START, END = "<!-- study: made by python -m xclip_jax.study --page -->", "<!-- /study -->"
_RUN_COLUMNS = ("arm", "runs")
_CURVES = (
    ("contrastive_loss", "Contrastive loss", "nats", ("clip/loss",), "clip/ln_b"),
    ("mutual_information", "Mutual information of images and clusters", "nats", ("nclip/mutual_information_img",), ""),
)


def write(docs: pathlib.Path, snapshot: Snapshot) -> pathlib.Path:
    """Write the page and its charts into a folder of documents, delete charts that it has no more; return its path."""
    drawn, name = _charts(snapshot), snapshot.study.page
    page, folder = docs / f"{name}.md", docs / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.stem not in drawn:
            path.unlink()
    for chart, svg in drawn.items():
        write_whole(epath.Path(folder / f"{chart}.svg"), svg)
    write_whole(epath.Path(page), render(snapshot, drawn))
    return page


def finding(snapshot: Snapshot) -> str:
    """Return what a README says of the study: a plot and the sentences that the first claims earn."""
    study, name = snapshot.study, "differences"
    link = f"[{study.title}](docs/{study.page}.md)"
    if not any(snapshot.finished(arm.name) for arm in study.of_section("core")):
        done, missing = conclusions.counts(snapshot)
        return f"{link}: under way, {done} of {done + missing} runs are finished and none of the core."
    drawn = [f"![Differences to CLIP](docs/{study.page}/{name}.svg)", ""] if name in _charts(snapshot) else []
    return "\n".join([*drawn, *conclusions.findings(snapshot), "", f"{link}: all of it."])


def write_finding(readme: pathlib.Path, snapshot: Snapshot) -> None:
    """Replace what stands between the marks of the study in a README; nothing, where it has none."""
    before, mark, rest = readme.read_text().partition(START)
    if mark:
        _, end, after = rest.partition(END)
        write_whole(epath.Path(readme), f"{before}{mark}\n{finding(snapshot)}\n{end}{after}")


def render(snapshot: Snapshot, drawn: Mapping[str, str]) -> str:
    """Return the page; `drawn` has the charts that it shows, by the names of their files."""
    study = snapshot.study
    sections: list[Iterator[str] | Sequence[str]] = [
        [f"# {study.title}", "", MADE.format(command=study.command, page=study.page), ""],
        [conclusions.progress(snapshot), ""],
        conclusions.section(snapshot),
        ["## What was run", "", *(line for text in study.about for line in (text, ""))],
        provenance.measures(snapshot),
        _tuning(snapshot),
        _core(snapshot, drawn),
        similarities.section(snapshot),
        _controls(snapshot),
        _doses(snapshot, drawn),
        _factors(snapshot),
        _training(snapshot, drawn),
        provenance.missing(snapshot),
        ["## Threats to validity", "", *(f"* {text}" for text in study.threats), ""],
        provenance.again(study),
    ]
    return "\n".join(line for section in sections for line in section).rstrip() + "\n"


# --- sections


def _tuning(snapshot: Snapshot) -> Iterator[str]:
    study = snapshot.study
    if not snapshot.chosen:
        return
    yield from ["## Recipes, chosen on validation", ""]
    yield f"By the mean of {study.choose.label} over seeds; a candidate with a run that diverged is not eligible."
    yield ""
    for objective in dict.fromkeys(arm.objective for arm in study.of_section("tuning")):
        best = snapshot.chosen[objective]
        arms = [arm for arm in study.of_section("tuning") if arm.objective == objective]
        rows = []
        for arm in arms:
            mark = " **chosen**" if best and best.name == arm.name else ""
            value = estimate_text(mean_of(snapshot, arm.name, study.choose), study.choose)
            rows.append([arm.title + mark, runs_text(snapshot, arm.name), value])
        yield from [f"### {objective}", "", *table(["candidate", "runs", study.choose.label], rows)]
        if best and (edges := _edges(best, arms)):
            yield from [f"At the edge of what was tried: {', '.join(edges)}.", ""]


def _edges(best: Arm, arms: Sequence[Arm]) -> list[str]:
    """Keys of which the best candidate has the smallest or the largest value of at least three."""
    numbers = {key: value for key, value in best.changes.items() if isinstance(value, (int, float))}
    tried = {key: {arm.changes[key] for arm in arms if key in arm.changes} for key in numbers}
    return [k for k, value in numbers.items() if len(tried[k]) > 2 and value in (min(tried[k]), max(tried[k]))]


def _core(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    study = snapshot.study
    head = [*_RUN_COLUMNS, *(measure.label for measure in study.measures)]
    yield from ["## Objectives, each at its own recipe", "", "Means over seeds with 95 % t-intervals.", ""]
    rows = rows_of(snapshot, titles_of(snapshot, "core"), study.measures)
    if study.common:
        first = study.measures[0]
        head = [*head, f"{first.label}, common recipe"]
        for row in rows:
            arm = study.common.get(row[0])
            row.append(estimate_text(mean_of(snapshot, arm, first), first) if arm else "-")
    yield from table(head, rows)
    others = {arm.title: arm.name for arm in study.of_section("core") if arm.name != study.baseline}
    yield from [f"Less {study.arm(study.baseline).title}, paired by seed (sign: how many of n are above zero):", ""]
    rows = [
        [title, *(_signed(verdicts.difference(snapshot, arm, study.baseline, m), m) for m in study.measures)]
        for title, arm in others.items()
    ]
    yield from table(["arm", *(measure.label for measure in study.measures)], rows)
    yield from _shown(snapshot.study, drawn, "differences", "Differences to the baseline")
    if study.common:
        yield from ["### All at one recipe", "", *table(head[:-1], rows_of(snapshot, study.common, study.measures))]


def _signed(d: Difference | None, measure: Measure) -> str:
    return difference_text(d, measure) + (f", {d.positive}/{d.n}" if d else "")


def _controls(snapshot: Snapshot) -> Iterator[str]:
    study = snapshot.study
    if not study.controls:
        return
    yield from ["## Controls", ""]
    common = set(study.common.values())
    arms = {arm.title: arm.name for arm in study.of_section("controls") if arm.name not in common}
    yield from table([*_RUN_COLUMNS, *(m.label for m in study.measures)], rows_of(snapshot, arms, study.measures))
    rows, survives, open_ = [], [], []
    for a, b, meaning in study.controls:
        left, right = snapshot.choice(a), snapshot.choice(b)
        names = [study.arm(name).title if name else "not chosen yet" for name in (left, right)]
        pairs = [verdicts.difference(snapshot, left, right, m) if left and right else None for m in study.measures]
        signed = [_signed(d, m) for d, m in zip(pairs, study.measures, strict=True)]
        rows.append([f"{names[0]} less {names[1]}", meaning, *signed])
        d, side = pairs[0], 1 if study.measures[0].higher else -1
        (survives if d and min(side * d.low, side * d.high) > 0 else open_).append(meaning)
    yield f"Of {study.measures[0].label}, an interval above zero shows: {'; '.join(survives) or 'nothing'}."
    yield f"Not shown: {'; '.join(open_) or 'nothing'}."
    yield ""
    yield from table(["difference", "what it shows", *(measure.label for measure in study.measures)], rows)


def _doses(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    if not snapshot.study.doses:
        return
    yield from ["## Dose and response", ""]
    for dose in snapshot.study.doses:
        yield from [f"### {dose.title}", ""]
        for measure in map(snapshot.study.measure, dose.measures):
            rows = [
                [name, *(estimate_text(mean_of(snapshot, arm, measure), measure, n=True) for arm in arms)]
                for name, arms in dose.lines.items()
            ]
            if len(dose.lines) == 2:
                (first, a), (second, b) = dose.lines.items()
                pairs = (verdicts.difference(snapshot, *pair, measure) for pair in zip(b, a, strict=True))
                rows.append([f"{second} less {first}", *(_signed(d, measure) for d in pairs)])
            yield from table([f"{measure.label}; {dose.axis}", *dose.levels], rows)
        yield from _shown(snapshot.study, drawn, f"dose_{dose.name}", dose.title)


def _factors(snapshot: Snapshot) -> Iterator[str]:
    study = snapshot.study
    arms = titles_of(snapshot, "factors")
    if not arms:
        return
    yield from ["## nCLIP, one factor at a time", "", "Fewer steps and seeds, on validation: leads, not verdicts.", ""]
    head = [*_RUN_COLUMNS, *(measure.label for measure in study.factors)]
    yield from table(head, rows_of(snapshot, arms, study.factors))
    if not study.search:
        return
    for objective in dict.fromkeys(arm.objective for arm in study.of_section("factors") if arm.objective):
        best = snapshot.chosen[objective]
        name = best.title if best else "not chosen yet"
        seeds = [arm.title for arm in study.arms if arm.tuned == objective]
        yield f"Best of them by {study.search.label}: **{name}**; on the tests it is {', '.join(seeds)}."
        yield ""


def _training(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    yield from ["## Training", ""]
    for name, title, *_ in _CURVES:
        yield from _shown(snapshot.study, drawn, name, title)
    rows, baseline = [], training_seconds(snapshot, snapshot.study.baseline)
    for section in ("core", "controls"):
        for title, arm in titles_of(snapshot, section).items():
            if seconds := training_seconds(snapshot, arm):
                rows.append([title, f"{seconds:,.0f}", f"{seconds / baseline:.2f}" if baseline else "-"])
    if rows:
        baseline_title = snapshot.study.arm(snapshot.study.baseline).title
        yield from table(["arm", "seconds of training", f"over {baseline_title}"], rows)
    yield from provenance.commits(snapshot)


def _shown(study: Study, drawn: Mapping[str, str], name: str, title: str) -> list[str]:
    return [f"![{title}]({study.page}/{name}.svg)", ""] if name in drawn else []


# --- charts


def _charts(snapshot: Snapshot) -> dict[str, str]:
    """{file name: SVG} of all charts that have something to show."""
    study = snapshot.study
    made: dict[str, str | None] = {}
    rows: dict[str, Estimate] = {}
    for arm in study.of_section("core"):
        for m in study.measures:
            if arm.name != study.baseline and not m.ratio:
                d = verdicts.difference(snapshot, arm.name, study.baseline, m)
                rows |= {f"{arm.title}: {m.label}": d} if d else {}
    made["differences"] = charts.in_rows(f"Less {study.arm(study.baseline).title}, paired by seed", rows, "points")
    for dose in study.doses:
        measure = study.measure(dose.measures[0])
        lines = {name: [_shown_mean(snapshot, arm, measure) for arm in arms] for name, arms in dose.lines.items()}
        made[f"dose_{dose.name}"] = charts.over_levels(dose.title, dose.axis, dose.levels, lines, measure.label)
    for name, title, unit, metrics, level in _CURVES:
        made[name] = _curve(snapshot, title, unit, metrics, level)
    return {name: svg for name, svg in made.items() if svg}


def _shown_mean(snapshot: Snapshot, arm: str, measure: Measure) -> Estimate | None:
    of_mean = mean_of(snapshot, arm, measure)
    return of_mean.mapped(math.exp) if of_mean and measure.ratio else of_mean


def _curve(snapshot: Snapshot, title: str, unit: str, metrics: Sequence[str], level: str) -> str | None:
    """Means over seeds of a metric of the core's runs, at the steps that all of an arm's runs have."""
    lines: dict[str, list[tuple[float, float]]] = {}
    dashed = None
    for arm in snapshot.study.of_section("core"):
        curves = [record.curve for record in snapshot.finished(arm.name).values()]
        metric = next((m for m in metrics if any(m in curve for curve in curves)), None)
        points: dict[float, list[float]] = {}
        for curve in curves:
            for step, value in zip(curve.get("step", ()), curve.get(metric or "", ()), strict=False):
                if step is not None and value is not None:
                    points.setdefault(step, []).append(value)
            if level and curve.get(level) and curve[level][-1] is not None:
                dashed = ("ln b", float(curve[level][-1] or 0))
        if points:
            lines[arm.title] = [(step, sum(values) / len(values)) for step, values in sorted(points.items())]
    return charts.over_steps(title, lines, unit, dashed)
