"""The page of a study, study.md with its charts in study/, written from the records alone."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from studies import charts, conclusions, contrasts, doses, provenance, similarities, verdicts
from studies.declaration import Arm, Measure
from studies.markdown import (
    estimate_text,
    mean_of,
    rows_of,
    runs_text,
    shown,
    table,
    titles_of,
)
from studies.matrix import Snapshot
from studies.statistics import Estimate
from xclip_jax.config import schema
from xclip_jax.storage import write_whole

MADE = "Made by `{command} --page` from `studies/{name}/runs.jsonl`; a test holds it current."
START, END = "<!-- study: made by python -m studies --page -->", "<!-- /study -->"
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
    study, name = snapshot.study, "finding"
    link = f"[{study.title}](docs/{study.page}.md)"
    if not any(snapshot.finished(arm.name) for arm in study.of_section("core")):
        done, missing = conclusions.counts(snapshot)
        return f"{link}: under way, {done} of {done + missing} runs are finished and none of the core."
    drawn = [f"![Differences from CLIP](docs/{study.page}/{name}.svg)", ""] if name in _charts(snapshot) else []
    return "\n".join([*drawn, *conclusions.findings(snapshot), "", f"{link}: all of it."])


def write_finding(readme: pathlib.Path, snapshot: Snapshot) -> None:
    """Replace what stands between the marks of the study in a README; nothing, where it lacks one of them."""
    before, mark, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if mark and end:
        write_whole(epath.Path(readme), f"{before}{mark}\n{finding(snapshot)}\n{end}{after}")


def render(snapshot: Snapshot, drawn: Mapping[str, str]) -> str:
    """Return the page; `drawn` has the charts that it shows, by the names of their files."""
    study, begun = snapshot.study, conclusions.counts(snapshot)[0] > 0
    sections: list[Iterator[str] | Sequence[str]] = [
        [f"# {study.title}", "", MADE.format(command=study.command, name=study.name), ""],
        [conclusions.progress(snapshot), ""],
        [] if begun else provenance.again(study, "Run it"),
        conclusions.summary(snapshot, drawn),
        ["## Threats to validity", "", *(f"* {text}" for text in study.threats), ""],
        ["## What was run", "", *(line for text in study.about for line in (text, ""))],
        provenance.measures(snapshot),
        _core(snapshot, drawn),
        contrasts.controls(snapshot),
        contrasts.sought(snapshot),
        similarities.section(snapshot),
        doses.section(snapshot, drawn),
        _factors(snapshot),
        conclusions.section(snapshot),
        _tuning(snapshot),
        contrasts.secondary(snapshot),
        _training(snapshot, drawn),
        provenance.missing(snapshot),
        provenance.again(study, "Run it again") if begun else [],
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
    return _extremes(best.changes, [arm.changes for arm in arms])


def _extremes(changes: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of numbers in `changes` that are the smallest or the largest of at least three values tried."""
    numbers = {key: value for key, value in changes.items() if isinstance(value, (int, float))}
    values = {key: {other[key] for other in tried if key in other} for key in numbers}
    return [k for k, value in numbers.items() if len(values[k]) > 2 and value in (min(values[k]), max(values[k]))]


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
    yield from [f"{contrasts.difference_from(study)} (x/n: how many of n are above zero):", ""]
    yield from contrasts.from_baseline(snapshot, [arm.name for arm in study.of_section("core")], study.measures)
    yield from provenance.at_chance(snapshot)
    yield from shown(study, drawn, "weights", "Differences over the weight of nCLIP")
    if any(map(snapshot.finished, study.common.values())):
        yield from ["### All at one recipe", ""]
        yield from [f"{_common_recipe(snapshot)}.", ""]
        yield from table(head[:-1], rows_of(snapshot, study.common, study.measures))
        if baseline := study.common.get(study.arm(study.baseline).title):
            yield from [f"{contrasts.difference_from(study, baseline)}:", ""]
            yield from contrasts.from_baseline(snapshot, tuple(study.common.values()), study.measures, baseline)


def _common_recipe(snapshot: Snapshot) -> str:
    """What all arms of one recipe change alike: "optim.lr 0.001, optim.warmup 300, the recipe of CLIP too"."""
    study = snapshot.study
    first, *others = [study.arm(arm).changes for arm in study.common.values()]
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    texts = [f"{key} {value:g}" for key, value in alike.items() if isinstance(value, (int, float))]
    keys: dict[str, set[str]] = {}
    for run in snapshot.runs:
        keys.setdefault(run.arm.name, set()).add(run.key)
    titles = titles_of(snapshot, "core")
    own = [title for title, arm in titles.items() if title in study.common and keys[arm] == keys[study.common[title]]]
    return ", ".join([*texts, *([f"the recipe of {', '.join(own)} too"] if own else [])])


def _factors(snapshot: Snapshot) -> Iterator[str]:
    study = snapshot.study
    arms = titles_of(snapshot, "factors")
    if not arms:
        return
    yield from ["## Factors and settings", "", "Fewer steps and seeds, on validation: leads, not verdicts.", ""]
    head = [*_RUN_COLUMNS, *(measure.label for measure in study.factors)]
    yield from table(head, rows_of(snapshot, arms, study.factors, each=True))
    if not study.search:
        return
    for objective in dict.fromkeys(arm.objective for arm in study.of_section("factors") if arm.objective):
        best = snapshot.chosen[objective]
        name = best.title if best else "not chosen yet"
        tests = ", ".join(arm.title for arm in study.arms if arm.tuned == objective)
        tried = sum(arm.objective == objective for arm in study.of_section("factors"))
        yield f"Best of the {tried} candidates for {tests}, by {study.search.label}: **{name}**."
        if best and (edges := _search_edges(snapshot, best)):
            yield f"At the edge of what was tried: {', '.join(edges)}."
        yield ""


def _search_edges(snapshot: Snapshot, best: Arm) -> list[str]:
    """Keys that a search's best candidate changed, and of which it has the smallest or the largest value tried."""
    candidates = [arm for arm in snapshot.study.of_section("factors") if arm.objective == best.objective]
    own = next(arm for arm in candidates if arm.name == best.name).changes
    names = {arm.name for arm in candidates}
    return _extremes(own, [schema.flatten(run.config.to_dict()) for run in snapshot.runs if run.arm.name in names])


def _training(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    yield from ["## Training", ""]
    for name, title, *_ in _CURVES:
        yield from shown(snapshot.study, drawn, name, title)
    yield from _clusters(snapshot)
    yield from provenance.commits(snapshot)


def _clusters(snapshot: Snapshot) -> Iterator[str]:
    """Metrics of the last step of arms that have them: how the clusters ended."""
    metrics = [measure for measure in snapshot.study.factors if not measure.set]
    arms = titles_of(snapshot, "core") | titles_of(snapshot, "controls")
    ended = {title: arm for title, arm in arms.items() if any(mean_of(snapshot, arm, measure) for measure in metrics)}
    if ended:
        yield from ["Clusters in the last step's batch:", ""]
        head = [*_RUN_COLUMNS, *(measure.label for measure in metrics)]
        yield from table(head, rows_of(snapshot, ended, metrics))


# --- charts


def _charts(snapshot: Snapshot) -> dict[str, str]:
    """{file name: SVG} of all charts that have something to show."""
    study = snapshot.study
    made: dict[str, str | None] = {}
    title = f"Difference from {study.arm(study.baseline).title}, percentage points"
    made["finding"] = charts.in_groups(title, _finding(snapshot), "mean over seeds, 95 %")
    made["weights"] = _weights(snapshot, title)
    for dose in (dose for dose in study.doses if doses.compared(snapshot, dose)):
        measure = study.measure(dose.measures[0])
        lines = {name: [_shown_mean(snapshot, arm, measure) for arm in arms] for name, arms in dose.lines.items()}
        made[f"dose_{dose.name}"] = charts.over_levels(dose.title, dose.axis, dose.levels, lines, f"{measure.label}, %")
    for name, title, unit, metrics, level in _CURVES:
        made[name] = _curve(snapshot, title, unit, metrics, level)
    return {name: svg for name, svg in made.items() if svg}


def _finding(snapshot: Snapshot) -> dict[str, dict[str, Estimate]]:
    """{measure: {arm: difference from the baseline}} of `Study.shown`."""
    study, groups = snapshot.study, {}
    arms = [arm for name in study.shown[0] if (arm := snapshot.choice(name))]
    for measure in map(study.measure, study.shown[1]):
        pairs = {arm: verdicts.difference(snapshot, arm, study.baseline, measure) for arm in arms}
        groups[measure.label] = {study.arm(arm).title: d for arm, d in pairs.items() if d}
    return groups


def _weights(snapshot: Snapshot, title: str) -> str | None:
    """Differences from the baseline over the weight of a term, a line a measure."""
    study, lines = snapshot.study, {}
    for measure in map(study.measure, study.shown[1]):
        line = [verdicts.difference(snapshot, arm, study.baseline, measure) for arm in study.weights.values()]
        lines[measure.label] = [Estimate(0.0, math.nan, math.nan, 1), *line] if any(line) else []
    return charts.over_levels(
        title, "weight of nCLIP, spaced evenly", ["0", *study.weights], lines, "mean over seeds, 95 %"
    )


def _shown_mean(snapshot: Snapshot, arm: str, measure: Measure) -> Estimate | None:
    of_mean = mean_of(snapshot, arm, measure)
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
    return charts.over_steps(title, lines, unit, dashed)
