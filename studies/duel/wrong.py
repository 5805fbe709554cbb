"""The sections of the duel's page on wrong captions, with their charts."""

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from studies import charts, tables, verdicts
from studies.declaration import Arm, Measure
from studies.duel import sections, spaces, stages
from studies.duel.chosen import Chosen
from studies.statistics import MIN_SEEDS, paired
from studies.tables import table

RIVALS = ("smoothed", "gce", "distilled", "superclip", "siglip", "clip", "nclip", "shuffled")
_SHARES = (0.25, 0.5, 0.75, 1.0)
_AREA = Measure("auc", "AUC", "")
_DRAWN = ("smoothed", "gce", "distilled", "superclip", "xclip", "oracle", "cheaper")  # the first six at a level
_SUSPECTED_BY = (
    ("clip", "loss"),
    ("smoothed", "loss"),
    ("xclip", "loss"),
    ("xclip", "clusters"),
    ("nclip", "clusters"),
    ("cheaper", "clusters"),
)


def own_charts(snapshot: Chosen, areas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{file name: SVG} of what other studies do not draw: arms under wrong captions, and what finds these captions."""
    study, made = snapshot.study, dict[str, str | None]()
    names = {arm.name for arm in study.arms}
    for level in stages.LEVELS:
        prefix = f"wrong{level}_"
        arms = [f"{prefix}{name}" for name in ("clip", *_DRAWN) if f"{prefix}{name}" in names]
        arms = arms[: len(charts.COLORS) + 1]
        groups = {}
        base = _base(arms, prefix)
        for measure in (study.measure("zeroshot_best"), study.measure("probe")) if base else ():
            pairs = {arm: verdicts.difference(snapshot, arm, base, measure) for arm in arms if arm != base}
            groups[measure.label] = {study.arm(arm).title: d for arm, d in pairs.items() if d}
        title = f"{level} % of captions exchanged: difference from {_title(base)}"
        made[f"wrong{level}"] = charts.in_groups(title, groups, "points, 95 %")
        lines = {}
        for name, score in _SUSPECTED_BY:
            points = _areas(areas, f"{prefix}{name}").get(score, {})
            lines[f"{spaces.WRONG_TITLES[name]} by {score}"] = [(step, _mean(seeds)) for step, seeds in points.items()]
        title = f"AUC of exchanged against true captions, {level} % exchanged"
        made[f"suspects{level}"] = charts.over_steps(title, lines, "%", ("chance", 50.0))
    return {name: svg for name, svg in made.items() if svg}


def _base(arms: Sequence[str], prefix: str) -> str:
    """The arm that others are drawn against: CLIP, or the best-known rival where CLIP is not among the best."""
    return next((f"{prefix}{name}" for name in ("clip", *RIVALS) if f"{prefix}{name}" in arms), "")


def _title(arm: str) -> str:
    return spaces.WRONG_TITLES.get(arm.partition("_")[2], "CLIP")


def read_areas(home: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of pairs.jsonl, the last of each checkpoint; none where it does not exist."""
    path = home / "pairs.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return list({(line["arm"], line["seed"], line["step"]): line for line in lines}.values())


def section(
    duel: stages.Duel, snapshot: Chosen, areas: Sequence[Mapping[str, Any]], drawn: Mapping[str, str], level: int
) -> Iterator[str]:
    """Yield the section on a level.

    Args:
      duel, snapshot: what is declared, and its finished runs.
      areas: lines of pairs.jsonl.
      drawn: paths of charts by name.
      level: % of captions that are exchanged.
    """
    prefix = f"wrong{level}_"
    yield from [f"## {level} % of captions exchanged", ""]
    arms = [arm for arm in duel.arms if arm.name.startswith(prefix)]
    if not arms:
        yield from ["Missing: no arm is retuned yet.", ""]
        return
    yield from sections.stage_table(duel, snapshot, prefix)
    if level != stages.LEVELS[0] and f"{prefix}xclip" not in {arm.name for arm in arms}:
        yield from ["xCLIP is not among the arms, which are the best on validation: nothing is claimed.", ""]
    if base := _base([arm.name for arm in arms], prefix):
        yield from [f"{tables.difference_from(snapshot.study, base)}:", ""]
        yield from tables.from_baseline(snapshot, [arm.name for arm in arms], snapshot.study.measures, base)
    yield from tables.shown(drawn, f"wrong{level}", f"Difference from {_title(base)} with {level} % exchanged")
    yield from sections.retuning(duel, level)
    yield "Training loss, CLIP's alone where there is one, at shares of the steps; flat where the last two are close:"
    yield ""
    rows = [[arm.title, *_losses(snapshot, arm)] for arm in arms]
    yield from table(["arm", *(f"{share:.0%}" for share in _SHARES)], rows)
    yield "AUC, %, with which a model tells exchanged pairs of its training data from true ones; 50 is chance:"
    yield ""
    rows = []
    for arm in (arm for arm in arms if arm.name != f"{prefix}oracle"):
        areas_of_arm = _areas(areas, arm.name)
        for score, points in areas_of_arm.items():
            texts = (f"{_mean(seeds):.1f} after {step} ({len(seeds)})" for step, seeds in points.items())
            rows.append([arm.title, score, ", ".join(texts)])
        rows += [] if areas_of_arm else [[arm.title, "missing", "missing"]]
    yield from table(["arm", "suspicion by", "AUC after steps (seeds)"], rows)
    yield from _suspects(areas, level)
    yield from tables.shown(drawn, f"suspects{level}", "AUC of exchanged captions over training")


Areas = dict[int, dict[int, float]]  # {step: {seed: AUC, %}}


def _areas(lines: Sequence[Mapping[str, Any]], arm: str) -> dict[str, Areas]:
    """{score: its AUC} of an arm, at steps that all of its seeds have."""
    of_arm = [line for line in lines if line["arm"] == arm]
    seeds = {line["seed"] for line in of_arm}
    scores: dict[str, Areas] = {}
    for score in ("loss", "cosine", "clusters"):
        for step in sorted({line["step"] for line in of_arm}):
            values = {line["seed"]: line[score] for line in of_arm if line["step"] == step and score in line}
            if values.keys() == seeds:
                scores.setdefault(score, {})[step] = values
    return scores


def _mean(by_seed: Mapping[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))


def _suspects(lines: Sequence[Mapping[str, Any]], level: int) -> Iterator[str]:
    """AUC by clusters minus AUC by losses: at the end, and each at the checkpoint with its best mean."""
    rows, ends = [], {}
    for arm, rival in itertools.product(("xclip", "cheaper"), ("clip", "smoothed", "xclip")):
        ours = _areas(lines, f"wrong{level}_{arm}").get("clusters")
        losses = _areas(lines, f"wrong{level}_{rival}").get("loss")
        if ours and losses:
            last = paired(ours[max(ours)], losses[max(losses)])
            best = paired(*(max(areas.values(), key=_mean) for areas in (ours, losses)))
            titles = [spaces.WRONG_TITLES[arm], f"{spaces.WRONG_TITLES[rival]}, its loss"]
            rows.append([*titles, *(tables.difference_text(d, _AREA) for d in (last, best))])
            ends |= {rival: last} if arm == "xclip" and last and last.n >= MIN_SEEDS else {}
    if rows:
        yield from ["AUC by clusters minus AUC by a loss, paired by seed:", ""]
        yield from table(["clusters of", "minus", "at the end", "each at its best checkpoint"], rows)
    if level == stages.LEVELS[0] and {"clip", "smoothed"} <= ends.keys():
        better = all(ends[rival].low > 0 for rival in ("clip", "smoothed"))
        worse = any(ends[rival].high < 0 for rival in ("clip", "smoothed"))
        verdict = "Shown" if better else "Refuted" if worse else "Undecided"
        claim = "xCLIP's clusters find wrong captions better than the loss of CLIP and of CLIP with tuned smoothing."
        yield from [f"*{claim}* **{verdict}** at the end of training, as declared.", ""]


def _losses(snapshot: Chosen, arm: Arm) -> list[str]:
    """The loss, CLIP's alone where the run has it, around shares of the run: three points of the curve, all seeds.

    A schedule of nCLIP's weight changes the sum of the losses when nothing is learned.
    """
    runs = [record.curve for record in snapshot.finished(arm.name).values() if not record.error]
    curves = [curve for run in runs if (curve := run.get("clip/loss") or run.get("loss"))]
    if not curves:
        return ["missing"] * len(_SHARES)
    losses = []
    for share in _SHARES:
        ends = [min(round(share * (len(curve) - 1)) + 2, len(curve)) for curve in curves]
        near = [x for curve, end in zip(curves, ends, strict=True) for x in curve[max(end - 3, 0) : end]]
        losses.append(np.mean([np.nan if x is None else x for x in near]))
    return [f"{loss:.3f}" for loss in losses]
