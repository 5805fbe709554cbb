"""The page of the study, docs/photographs/tables.md with its charts, from records."""

from collections.abc import Mapping, Sequence

import numpy as np

from studies import page, verdicts
from studies.declaration import ClaimPart, Measure
from studies.matrix import Snapshot
from studies.photographs import spaces, stages
from studies.photographs.claims import BOTH_WAYS

MEASURES = (
    Measure("unseen", "rank among unseen kinds", stages.VALIDATION[0], ("rank_gmean",), higher=False, ratio=True),
    Measure("known", "rank among known kinds", stages.VALIDATION[1], ("rank_gmean",), higher=False, ratio=True),
    Measure("retrieval", "retrieval, R@1", stages.VALIDATION[2], BOTH_WAYS),
    Measure("kind", "probe of kind", stages.VALIDATION[3], ("kind/linear/top1",)),
)
DRAWN = ("unseen", "kind", "retrieval")  # measures of the chart
BASELINE = "final_clip"


def lines(study: stages.Photographs, snapshot: Snapshot, charts: Mapping[str, str]) -> list[str]:
    """Return the lines of the page; `charts` has names and SVGs."""
    made = "Made by `python -m studies photographs --page` from `studies/photographs/runs.jsonl`."
    text = [f"# {snapshot.study.title}: tables", "", made, "", *page.missing(snapshot)]
    if study.to_measure:
        names = ", ".join(f"`{arm.name}`" for arm, _ in study.to_measure)
        text += [f"Costs of a step to be measured: {names}.", ""]
    if len(study.chosen) < len(spaces.TEAMS) or study.to_measure:
        text += ["Later arms follow from these.", ""]
    text += ["## The recommended recipe", "", "Points behind the best setting, on validation.", "", *_regrets(study)]
    text += ["## Length and search", "", f"Steps of CLIP in finals: {study.length or 'open'}.", ""]
    for team in spaces.TEAMS:
        settings = study.chosen.get(team, {})
        winner = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        text += [f"Winner of {team}: {winner or 'open'}.", ""]
    searched = [arm.name for arm in study.arms if arm.name.startswith(("pilot_", "search"))]
    text += page.arms(snapshot, searched, MEASURES)
    tested = [arm.name for arm in study.arms if arm.tested]
    if tested:
        text += ["## Tests", "", *page.arms(snapshot, tested)]
        others = [name for name in tested if name.startswith(("final_", "control_")) and name != BASELINE]
        text += page.differences(snapshot, BASELINE, others)
        for name in tested:
            rival = name.removesuffix("xclip") + "clip"
            if name.endswith("_xclip") and rival in tested and rival != BASELINE:
                text += page.differences(snapshot, rival, [name])
    text += [line for name in charts for line in (f"![{name}]({name}.svg)", "")]
    return [*text, "## Claims", "", *page.claims(snapshot)]


def _regrets(study: stages.Photographs) -> list[str]:
    """Return the table of `stages.regrets`, or a sentence while runs are missing."""
    arms = [arm for arm in study.arms if arm.name.startswith("defaults_")]
    finished = {arm.name: study.finished(arm) for arm in arms}
    records = {name: runs for name, runs in finished.items() if runs is not None}
    if len(records) < len(arms):
        return [f"{len(arms) - len(records)} of {len(arms)} settings have missing runs.", ""]
    behind = stages.regrets(records)
    measures = list(dict.fromkeys(name for points in behind.values() for name in points))
    rows = [
        [setting, *(f"{points[name]:.1f}" for name in measures), f"{max(points.values()):.1f}"]
        for setting, points in behind.items()
    ]
    return page.table(["rate_smoothing", *measures, "largest"], rows)


def charts_of(snapshot: Snapshot) -> dict[str, str]:
    """Return {name: SVG} of the charts with something to show."""
    groups = {}
    for arm in snapshot.study.arms:
        if not arm.name.startswith(("final_", "control_")) or arm.name == BASELINE:
            continue
        rows = {}
        for name in DRAWN:
            d = verdicts.difference(snapshot, ClaimPart("", name, (arm.name,), (BASELINE,)))
            if d is not None:
                rows[snapshot.study.measure(name).label] = d
        if rows:
            groups[arm.title] = rows
    made = {"differences": page.chart_of_differences("Differences from CLIP", groups, "points, 95 %")}
    curves = {arm: _evaluations(snapshot, arm) for arm in (BASELINE, "final_xclip")}
    for name in curves[BASELINE]:
        drawn = {page.title_of(snapshot, arm): lines[name] for arm, lines in curves.items() if name in lines}
        file_name = name.rpartition("photographs/")[2].replace(" ", "_").replace("/", "_")
        made[file_name] = page.chart_of_curves(name, drawn, "%")
    return {name: svg for name, svg in made.items() if svg}


def _evaluations(snapshot: Snapshot, arm: str) -> dict[str, Sequence[tuple[float, float]]]:
    """Return {headline: (step, mean over seeds) points} of the evaluations during an arm's runs."""
    values: dict[str, dict[float, list[float]]] = {}
    for record in snapshot.finished(arm).values():
        for line in record.evaluations:
            for name, value in line.items():
                if name != "step":
                    values.setdefault(name, {}).setdefault(line["step"], []).append(value)
    return {
        name: [(step, float(np.mean(points))) for step, points in sorted(steps.items())]
        for name, steps in values.items()
    }
