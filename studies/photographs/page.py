"""The page of the study, docs/photographs/tables.md with its charts, from records."""

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np

from studies import page, verdicts
from studies.declaration import ClaimPart, Measure
from studies.matrix import Matrix
from studies.page import estimate_text
from studies.photographs import spaces, stages
from studies.photographs.claims import BOTH_WAYS

# On validation, for choices.
MEASURES = (
    Measure("unseen", "rank among unseen kinds", stages.VALIDATION[0], ("rank_gmean",), higher=False, ratio=True),
    Measure("known", "rank among known kinds", stages.VALIDATION[1], ("rank_gmean",), higher=False, ratio=True),
    Measure("retrieval", "retrieval, R@1", stages.VALIDATION[2], BOTH_WAYS),
    Measure("kind", "probe of kind", stages.VALIDATION[3], stages.PROBE),
)
DEFAULTS = {  # measures of the recommended recipe
    "photographs": (
        Measure("unseen", "unseen kinds", stages.VALIDATION[0], ("top1",)),
        Measure("known", "known kinds", stages.VALIDATION[1], ("top1",)),
        Measure("retrieval", "retrieval", stages.VALIDATION[2], BOTH_WAYS),
        Measure("kind", "probe of kind", stages.VALIDATION[3], stages.PROBE),
    ),
    "icons": (
        Measure("unseen", "unseen concepts", stages.ICON_VALIDATION[0], ("top1",)),
        Measure("retrieval", "retrieval", stages.ICON_VALIDATION[1], BOTH_WAYS),
        Measure("probe", "probe", stages.ICON_VALIDATION[2]),
    ),
}
_NAMING = tuple(m for m in stages.MEASURES if m.name.startswith(("unseen", "known", "colours")))
_RETRIEVAL = tuple(m for m in stages.MEASURES if m.name.startswith(("to_", "retrieval")))
_FEATURES = tuple(m for m in stages.MEASURES if m not in (*_NAMING, *_RETRIEVAL))
_READ = (*_NAMING, *_RETRIEVAL)  # measures that depend on the reading of two heads
DRAWN = ("unseen", "known", "kind", "retrieval")  # measures of the charts of differences
_AGAINST = tuple(
    m for m in stages.MEASURES if m.name in ("unseen", "unseen_mean", "unseen_titles", "known", "retrieval", "kind")
)
BASELINE = "final_clip"
GAINS = {  # of xCLIP over CLIP, by training
    "loose titles, batch 256": ("final_xclip", BASELINE),
    "half of them tight": ("captions_half_xclip", "captions_half_clip"),
    "tight captions": ("captions_tight_xclip", "captions_tight_clip"),
    "tight, equal ones not matching": ("captions_tight_pairs_xclip", "captions_tight_pairs_clip"),
    "loose titles, batch 64": ("batch_64_xclip", "batch_64_clip"),
    "loose titles, batch 512": ("batch_512_xclip", "batch_512_clip"),
}


def lines(matrix: stages.Photographs, charts: Mapping[str, str]) -> list[str]:
    """Return the lines of the page; `charts` has names and SVGs."""
    made = "Made by `python -m studies photographs --page` from `studies/photographs/runs.jsonl`."
    text = [f"# {matrix.study.title}: tables", "", made, "", *page.missing(matrix)]
    if matrix.to_measure:
        names = ", ".join(f"`{arm.name}`" for arm, _ in matrix.to_measure)
        text += [f"Costs of a step to be measured: {names}.", ""]
    if len(matrix.chosen) < len(spaces.TEAMS) or matrix.to_measure:
        text += ["Later arms follow from these.", ""]
    text += ["## The recommended recipe", "", "Points behind the best setting, on validation.", "", *regrets(matrix)]
    for corpus, measures in DEFAULTS.items():
        pairs = {
            f"smoothing {x:g} at a rate of {lr:g}": (f"defaults_{corpus}_{lr:g}_{x:g}", f"defaults_{corpus}_{lr:g}_0")
            for lr in stages.RATES
            for x in stages.SMOOTHINGS[1:]
        }
        text += page.differences(matrix, f"change of CLIP on {corpus}", pairs, measures)
    text += ["## Length and search", "", _length(matrix), ""]
    for team in spaces.TEAMS:
        winner, by_own = (spaces.in_words(settings.get(team, {})) for settings in (matrix.chosen, matrix.by_own))
        text += [f"Winner of {spaces.TITLES[team]}: {winner or 'open'}."]
        text += [f"By the embeddings' similarity alone: {by_own}.", ""] if winner and by_own != winner else [""]
    searched = [arm.name for arm in matrix.study.arms if arm.name.startswith(("pilot_", "search"))]
    text += page.arms(matrix, searched, MEASURES)
    tested = [arm.name for arm in matrix.study.arms if arm.tested and matrix.finished(arm.name)]
    if tested:
        reading = "the sum of both similarities" if matrix.both_heads else "the embeddings' similarity"
        text += ["## Tests", "", f"Validation chose to read models with two heads by {reading}.", ""]
        compared = {page.title_of(matrix, name): (name, BASELINE) for name in _compared(matrix)}
        for title, measures in (("Naming", _NAMING), ("Retrieval", _RETRIEVAL), ("Features", _FEATURES)):
            text += [f"### {title}", "", *page.arms(matrix, tested, measures)]
            text += page.differences(matrix, "minus CLIP", compared, measures)
            text += page.differences(matrix, "xCLIP minus CLIP", _gains(matrix), measures)
        pair = {spaces.CONTROLS["detached_head"][0]: ("final_xclip", "control_detached_head")}
        for measures in (_NAMING, _RETRIEVAL, _FEATURES):
            text += page.differences(matrix, "xCLIP minus", pair, measures)
        text += _by_the_other_reading(matrix, tested)
        text += _against_controls(matrix)
        text += _over_training(matrix)
    text += [line for name in charts for line in (f"![{name}]({name}.svg)", "")]
    return [*text, "## Claims", "", *page.claims(matrix)]


def _length(matrix: stages.Photographs) -> str:
    """Return a sentence on the length of finals, and on pilots if none settles, as none without a curve can."""
    pilots = [run for arm in matrix.study.arms if arm.name.startswith("pilot_") for run in matrix.complete(arm)]
    text = f"Steps of CLIP in finals: {matrix.length or 'open'}"
    if matrix.length and not any(map(stages.settles, pilots)):
        without = [run.config["steps"] for run in pilots if not run.evaluations]
        text += "; no pilot settles" + "".join(f", and that of {steps} steps has no curve" for steps in without)
    return f"{text}."


def _by_the_other_reading(matrix: stages.Photographs, names: Sequence[str]) -> list[str]:
    """Return tables of the arms whose values depend on `both_heads`, with the other choice."""
    other = copy.copy(matrix)
    other.both_heads = not matrix.both_heads
    two_heads = [name for name in names if any(matrix.values(name, m) != other.values(name, m) for m in _READ)]
    if not two_heads:
        return []
    pairs = {page.title_of(matrix, name): (name, BASELINE) for name in _compared(matrix) if name in two_heads}
    lines = ["### By the other reading of two heads", ""]
    for measures in (_NAMING, _RETRIEVAL):
        lines += page.arms(other, two_heads, measures)
        lines += page.differences(other, "minus CLIP", pairs, measures)
    rows = []
    for number, claim in enumerate(other.study.claims, 1):
        for part in claim.parts:
            found = verdicts.difference(other, part), verdicts.unpaired_difference(other, part)
            texts = [estimate_text(x, other.study.measure(part.measure), difference=True) for x in found]
            rows.append([f"{number}. {part.text}", *texts])
    return [*lines, *page.table(["part of a claim", "difference", "without pairing"], rows)]


def _against_controls(matrix: stages.Photographs) -> list[str]:
    """Return tables of xCLIP minus CLIP and each control, by both readings of two heads."""
    others = [BASELINE, *(name for name in _compared(matrix) if name != "final_xclip")]
    if not matrix.finished("final_xclip"):
        return []
    note = "Not paired, with one variance for all arms; the intervals of a column hold together with 95 % (Bonferroni)."
    lines = ["### xCLIP minus each control", "", note, ""]
    readings = {"by the embeddings": False, "by both heads": True}
    for title, both_heads in readings.items():
        read = copy.copy(matrix)
        read.both_heads = both_heads
        lines += page.against_each(read, f"xCLIP minus, {title}", "final_xclip", others, _AGAINST)
    return lines


def _over_training(matrix: Matrix) -> list[str]:
    """Return a table of xCLIP minus CLIP on validation after each eighth of the training time."""
    xclip, clip = (_evaluations(matrix, arm) for arm in ("final_xclip", BASELINE))
    rows = []
    for name in clip.keys() & xclip.keys():
        pairs = zip(xclip[name], clip[name], strict=False)
        rows.append([name, *(f"{value - before:+.1f}" for (_, value), (_, before) in pairs)])
    head = ["xCLIP minus CLIP on validation", *(f"{i}/{stages.EIGHTHS}" for i in range(1, stages.EIGHTHS + 1))]
    note = "By the embeddings' similarity, after each eighth of the time; means over seeds."
    return ["### Over training", "", note, "", *page.table(head, sorted(rows))] if rows else []


def _compared(matrix: Matrix) -> list[str]:
    """Return the arms with runs to compare with `BASELINE`."""
    names = [arm.name for arm in matrix.study.arms if arm.name.startswith(("final_", "control_"))]
    return [name for name in names if name != BASELINE and matrix.finished(name)]


def _gains(matrix: Matrix) -> dict[str, tuple[str, str]]:
    """Return `GAINS` of arms with runs."""
    return {title: pair for title, pair in GAINS.items() if all(map(matrix.finished, pair))}


def regrets(matrix: Matrix) -> list[str]:
    """Return a table of the points by which each default setting is behind the best, or a sentence with missing runs.

    A setting with a diverged run is infinitely behind.
    """
    arms = [arm.name for arm in matrix.study.arms if arm.name.startswith("defaults_")]
    missing = len(matrix.missing().keys() & set(arms))
    if missing:
        return [f"{missing} of {len(arms)} settings have missing runs.", ""]
    settings = list(dict.fromkeys(name.split("_", 2)[2] for name in arms))
    behind = {}
    for corpus, measures in DEFAULTS.items():
        for measure in measures:
            of_arms = [matrix.values(f"defaults_{corpus}_{setting}", measure) for setting in settings]
            means = np.mean([[x.get(seed, -math.inf) for seed in stages.TUNING_SEEDS] for x in of_arms], axis=1)
            behind[f"{corpus}, {measure.label}"] = means.max() - means
    points = np.stack(list(behind.values()), axis=1)
    rows = [
        [setting, *(f"{x:.1f}" for x in row), f"{row.max():.1f}"] for setting, row in zip(settings, points, strict=True)
    ]
    return page.table(["rate_smoothing", *behind, "largest"], rows)


def charts_of(matrix: Matrix) -> dict[str, str]:
    """Return {name: SVG} of the charts with something to show."""
    of_arms = {page.title_of(matrix, arm): (arm, BASELINE) for arm in _compared(matrix)}
    made = {}
    for name, title, pairs in (
        ("differences", "Differences from CLIP", of_arms),
        ("gains", "xCLIP minus CLIP", _gains(matrix)),
    ):
        groups = {}
        for label, (arm, baseline) in pairs.items():
            tight = arm.startswith("captions_tight")  # these models retrieve the captions that they learned
            measures = {name: f"{name}_tight" if tight and name == "retrieval" else name for name in DRAWN}
            parts = {matrix.study.measure(k).label: ClaimPart("", m, (arm,), (baseline,)) for k, m in measures.items()}
            rows = {measure: verdicts.difference(matrix, part) for measure, part in parts.items()}
            groups[label] = {measure: d for measure, d in rows.items() if d is not None}
        made[name] = page.chart_of_differences(title, groups, "points, 95 %")
    curves = {arm: _evaluations(matrix, arm) for arm in (BASELINE, "final_xclip")}
    for name in curves[BASELINE]:
        drawn = {page.title_of(matrix, arm): lines[name] for arm, lines in curves.items() if name in lines}
        file_name = name.rpartition("photographs/")[2].replace(" ", "_").replace("/", "_")
        made[file_name] = page.chart_of_curves(name, drawn, "%")
    return {name: svg for name, svg in made.items() if svg}


def _evaluations(matrix: Matrix, arm: str) -> dict[str, Sequence[tuple[float, float]]]:
    """Return {headline: (step, mean over seeds) points} of the sets that an arm's runs evaluate during training."""
    values: dict[str, dict[float, list[float]]] = {}
    for record in matrix.finished(arm).values():
        for line in record.evaluations:
            for name, value in line.items():
                if name.startswith(stages.CURVES):
                    values.setdefault(name, {}).setdefault(line["step"], []).append(value)
    return {
        name: [(step, float(np.mean(points))) for step, points in sorted(steps.items())]
        for name, steps in values.items()
    }
