"""The page of the duel, made from its records: what is missing is shown as missing."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from studies import charts, claims, records, tables, verdicts
from studies.declaration import Arm, Claim, ClaimPart, Measure
from studies.duel import glyphs, spaces, stages
from studies.duel.chosen import BEST, Chosen
from studies.icons import study as icons
from studies.matrix import Matrix, Snapshot
from studies.page import write_page
from studies.statistics import MIN_SEEDS, paired, seeds_needed
from studies.tables import table
from xclip_jax.config.load import load_config

NAMED = dict(zip(icons.VALIDATION, ("zeroshot", "rendering"), strict=True))
_OLD_RUNS = pathlib.Path(icons.__file__).with_name("runs.jsonl")
_OLD = ("clip_steps4000", "clip_steps4000_longer", "xclip_steps4000")
_OF_OTHERS = ("smoothed", "gce", "distilled", "superclip", "siglip", "clip", "nclip", "shuffled")
MOST_SEEDS = 100
_MADE = (
    "Made by `python -m studies duel --page` from the records in `studies/duel`; a test holds it current. What was "
    "declared before the runs, and why, is in `studies/duel/study.md`."
)
_SHARES = (0.25, 0.5, 0.75, 1.0)
_AREA = Measure("auc", "AUC", "")
_DRAWN = ("smoothed", "gce", "distilled", "superclip", "xclip", "oracle")  # as many as there are colours
_SUSPECTED_BY = (
    ("clip", "loss"),
    ("smoothed", "loss"),
    ("xclip", "loss"),
    ("xclip", "clusters"),
    ("nclip", "clusters"),
)


def measures() -> tuple[Measure, ...]:
    """The first study's measures, and naming by the similarity that is best on validation for each arm."""
    chosen = []
    for measure in icons.MEASURES:
        if measure.name in NAMED.values():
            what = f"{measure.what}; by the similarity or mixture that is best for an arm on validation"
            label = f"{measure.label}, chosen similarity"
            chosen.append(Measure(f"{measure.name}{BEST}", label, measure.set, family=measure.family, what=what))
    return (*icons.MEASURES, *chosen)


def _against(a: str, others: Sequence[str], names: set[str], prefix: str) -> tuple[ClaimPart, ...]:
    """Parts: arm `a` is better than each of the others that is declared, at naming and at the probe."""
    pairs = [(f"{prefix}{b}", text) for b in others for text in ("zeroshot_best", "probe") if f"{prefix}{b}" in names]
    what = {"zeroshot_best": "names better", "probe": "has the better probe"}
    return tuple(ClaimPart(f"{what[m]} than {b.partition('_')[2]}", a, b, m) for b, m in pairs if a in names and a != b)


def duel_claims(arms: Sequence[Arm]) -> tuple[Claim, ...]:
    """The declared claims, as far as their arms are declared: what is tested, each with Holm's correction."""
    names = {arm.name for arm in arms}
    declared = []
    if {"final_clip", "final_xclip"} <= names:
        ours, clip = "final_xclip", "final_clip"
        parts = _against(ours, ("clip",), names, "final_")
        declared.append(
            Claim("At equal cost xCLIP's best names better and has better features than CLIP's best.", parts)
        )
        margin = (ClaimPart("its naming is at least as good", ours, clip, "zeroshot_best", margin=1.0), parts[1])
        declared.append(Claim("At equal cost xCLIP's best names as well, and has better features.", margin))
        families = [m for m in measures() if m.family and m.name not in NAMED.values()]
        parts = tuple(ClaimPart(f"it gains at {m.family}", ours, clip, m.name) for m in families)
        declared.append(Claim("xCLIP's gain holds in every family of tests.", parts))
        if parts := _against(ours, ("shuffled", *stages.RIVALS), names, "final_"):
            text = "xCLIP's gain is more than other terms of equal cost, or shuffled pseudo-labels, give."
            declared.append(Claim(text, parts))
    for level, arms_of_level in zip(stages.LEVELS, (len(stages.WRONG_TITLES), stages.BEST_AT_HALF), strict=True):
        parts = _against(f"wrong{level}_xclip", _OF_OTHERS, names, f"wrong{level}_")
        if parts and sum(name.startswith(f"wrong{level}_") for name in names) == arms_of_level:
            text = f"With {level} % of captions exchanged xCLIP is better than every rival retuned for it."
            declared.append(Claim(text, parts))
    return tuple(declared)


def snapshot_of(duel: stages.Duel, load: Any = load_config) -> Chosen:
    """Return the finished runs of all that is declared."""
    names = [arm.name for arm in duel.arms]
    finals = [name for name in names if name.startswith("final_")]
    shown = ([name for name in finals if name != "final_clip"], ("zeroshot_best", "rendering_best", "probe"))
    baseline = "final_clip" if finals else names[0]
    study = stages.study_of(
        duel.arms, measures=measures(), named=NAMED, claims=duel_claims(duel.arms), baseline=baseline,
        shown=shown if finals else ((), ()),
    )  # fmt: skip
    return Chosen(stages.DuelMatrix(study, load), duel.records)


def write(docs: pathlib.Path, duel: stages.Duel, areas: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Write duel.md and its charts, duel/*.svg, into a folder of documents, and return the page's path."""
    snapshot = snapshot_of(duel)
    svgs = (charts.of_study(snapshot) | own_charts(snapshot, areas)) if snapshot.records else {}
    return write_page(docs, "duel", svgs, lambda drawn: render(duel, snapshot, areas, drawn))


def own_charts(snapshot: Chosen, areas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{file name: SVG} of what other studies do not draw: arms under wrong captions, and what finds these captions."""
    study, made = snapshot.study, dict[str, str | None]()
    names = {arm.name for arm in study.arms}
    for level in stages.LEVELS:
        prefix = f"wrong{level}_"
        arms = [f"{prefix}{name}" for name in ("clip", *_DRAWN) if f"{prefix}{name}" in names]
        groups = {}
        base = _base(arms, prefix)
        for measure in (study.measure("zeroshot_best"), study.measure("probe")) if base else ():
            pairs = {arm: verdicts.difference(snapshot, arm, base, measure) for arm in arms if arm != base}
            groups[measure.label] = {study.arm(arm).title: d for arm, d in pairs.items() if d}
        title = f"{level} % of captions exchanged: difference from {_wrong_title(base)}, percentage points"
        made[f"wrong{level}"] = charts.in_groups(title, groups, "mean over seeds, 95 %")
        lines = {}
        for name, score in _SUSPECTED_BY:
            points = _areas(areas, f"{prefix}{name}").get(score, {})
            lines[f"{stages.WRONG_TITLES[name]} by {score}"] = [(step, _mean(seeds)) for step, seeds in points.items()]
        title = f"AUC of exchanged against true captions, {level} % exchanged"
        made[f"suspects{level}"] = charts.over_steps(title, lines, "%", ("chance", 50.0))
    return {name: svg for name, svg in made.items() if svg}


def _base(arms: Sequence[str], prefix: str) -> str:
    """The arm that others are drawn against: CLIP, or the best-known rival where CLIP is not among the best."""
    return next((f"{prefix}{name}" for name in ("clip", *_OF_OTHERS) if f"{prefix}{name}" in arms), "")


def _wrong_title(arm: str) -> str:
    return stages.WRONG_TITLES.get(arm.partition("_")[2], "CLIP")


def read_areas(home: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of pairs.jsonl, the last of each checkpoint; none where it does not exist."""
    path = home / "pairs.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return list({(line["arm"], line["seed"], line["step"]): line for line in lines}.values())


def render(duel: stages.Duel, snapshot: Chosen, areas: Sequence[Mapping[str, Any]], drawn: Mapping[str, str]) -> str:
    """Return the page.

    Args:
      duel, snapshot: what is declared, and its finished runs.
      areas: lines of pairs.jsonl.
      drawn: paths of charts by name.
    """
    parts: list[Iterator[str] | Sequence[str]] = [
        [f"# {snapshot.study.title}", "", _MADE, ""],
        _progress(duel),
        claims.summary(snapshot, drawn) if snapshot.study.claims else ["No verdict yet: the finals are missing.", ""],
        _heads(duel),
        _teams(duel),
        _finals(duel, snapshot, drawn),
        *(_wrong(duel, snapshot, areas, drawn, level) for level in stages.LEVELS),
        glyphs.section(glyphs.snapshot(duel)),
        claims.section(snapshot) if snapshot.study.claims else [],
        _changes(snapshot) if snapshot.study.claims else [],
        ["## Missing", "", *(f"* {line}" for line in duel.missing() or ["nothing"])],
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _changes(snapshot: Chosen) -> Iterator[str]:
    """What would have changed each verdict, from the scatter that was seen."""
    rows = []
    for number, claim in enumerate(snapshot.study.claims, 1):
        for part in verdicts.judge(snapshot, claim).parts:
            d, margin = part.difference, part.part.margin
            needed = ["-", "-"]
            if d is not None and d.n >= MIN_SEEDS:
                deviation = d.standard_error * math.sqrt(d.n)
                seeds = seeds_needed(d.mean + margin, deviation, MOST_SEEDS)
                none = f"over {MOST_SEEDS}" if d.mean + margin > 0 else "the mean is against it"
                needed = [f"{d.high - d.mean - margin:+.1f}", str(seeds or none)]
            cells = [f"{number}. {part.part.text}", tables.difference_text(d, part.measure), part.verdict]
            rows.append([*cells, *needed])
    yield from ["## What would have changed a verdict", ""]
    yield "*Shown from*: the mean difference, in points, from which a part is shown with the scatter over seeds that"
    yield "was seen. *Seeds*: how many show the mean that was seen in four of five studies."
    yield from ["", *table(["part", "difference, 95 %", "verdict", "shown from", "seeds"], rows)]


def _progress(duel: stages.Duel) -> list[str]:
    rows = [
        [stage.title, f"`{stage.prefix}`", str(stage.runs), str(done), str(stage.steps), f"{hours:.1f}"]
        for stage, done, hours in (*duel.progress(), glyphs.progress(duel))
    ]
    return table(["stage", "arms", "runs", "done", "steps of CLIP's clock", "hours of two cores left"], rows)


def _cells(duel: stages.Duel, arm: Arm) -> list[str]:
    """Finished runs, and the two measures of all choices."""
    values = duel.values(arm)
    shown = ["missing", "missing"] if values is None else [f"{np.exp(-values[0]):.2f}", f"{values[1]:.1f}"]
    return [f"{duel.done(arm)} of {len(arm.seeds)}", *shown]


_HEAD = ("runs", "naming on validation, rank", "probe on validation")


def _heads(duel: stages.Duel) -> Iterator[str]:
    yield from ["## Cheap clusters", ""]
    rows = []
    arms = {arm.title: arm for arm in duel.arms if arm.name.startswith("heads_")}
    for name, (clusters, hidden, layers) in spaces.HEADS.items():
        ratio = duel.costs.get(f"heads_{name}")
        size = f"{clusters} clusters" + (f", hidden {hidden}" if layers else ", linear")
        mark = " **chosen**" if name == duel.head else ""
        cells = _cells(duel, arms[name]) if name in arms else ["none: costs too much" if ratio else "", "", ""]
        rows.append([size + mark, "missing" if ratio is None else f"{ratio:.3f}", *cells])
    yield from table(["head", "step over CLIP's", *_HEAD], rows)
    first, chosen = (next((a for a in duel.arms if a.title == n), None) for n in (next(iter(spaces.HEADS)), duel.head))
    if chosen and first and (old := duel.values(first)) and (new := duel.values(chosen)):
        ratio = duel.costs[chosen.name]
        met = "at most" if ratio <= stages.MOST_COST else "above"
        yield f"The chosen head costs {ratio:.3f}, {met} {stages.MOST_COST}; beside the first study's its rank is "
        yield f"multiplied by {np.exp(old[0] - new[0]):.2f} and its probe changes by {new[1] - old[1]:+.1f} points."
        yield ""


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in settings.items())  # fmt: skip


def _teams(duel: stages.Duel) -> Iterator[str]:
    yield from ["## Two teams", "", "Candidates by the mean of their ranks at both measures, the best first.", ""]
    for team in spaces.SPACES:
        winner = duel.winners.get(team)
        yield from [f"### {team}: {'no winner yet' if winner is None else f'candidate {winner + 1}'}", ""]
        for number, _ in enumerate(stages.RUNGS, 1):
            arms = {arm.name: arm for arm in duel.arms if arm.name.startswith(f"rung{number}_{team}_")}
            if not arms:
                continue
            known = {name: values for name, arm in arms.items() if (values := duel.values(arm))}
            order = [*stages.by_mean_rank(known), *(name for name in arms if name not in known)]
            rows = []
            for name in order:
                index = int(name.rpartition("_")[2]) - 1
                mark = " **winner**" if number == len(stages.RUNGS) and index == winner else ""
                settings = _settings_text(spaces.candidates(team)[index])
                rows.append([f"{index + 1}{mark}", settings, *_cells(duel, arms[name])])
            yield from [f"Rung {number}, {stages.RUNGS[number - 1].steps} steps:", ""]
            yield from table(["candidate", "settings", *_HEAD], rows)


def _rows(duel: stages.Duel, snapshot: Chosen, prefix: str) -> list[str]:
    """The declared arms of a stage with all measures, and their steps and costs."""
    arms = [arm for arm in duel.arms if arm.name.startswith(prefix)]
    shown = {arm.title: arm.name for arm in arms}
    rows = tables.rows_of(snapshot, shown, measures())
    for row, arm in zip(rows, arms, strict=True):
        row.insert(1, str(arm.changes["steps"]))
    return table(["arm", "steps", "runs", *(m.label for m in measures())], rows)


def _finals(duel: stages.Duel, snapshot: Chosen, drawn: Mapping[str, str]) -> Iterator[str]:
    yield from ["## The winners at equal cost, and controls", ""]
    arms = [arm.name for arm in duel.arms if arm.name.startswith("final_")]
    if not arms:
        yield from ["Missing: the winners are not known yet.", ""]
        return
    yield from _rows(duel, snapshot, "final_")
    yield from [f"{tables.difference_from(snapshot.study)}:", ""]
    yield from tables.from_baseline(snapshot, arms, measures())
    yield from tables.shown(drawn, charts.CURVES[0][0], charts.CURVES[0][1])
    yield from ["The first study's runs of 4,000 steps, with its recipes and heads:", ""]
    old = Snapshot(Matrix(icons.study(), load_config), records.read_all(_OLD_RUNS))
    shown = {old.study.arm(name).title: name for name in _OLD}
    yield from table(["arm", "runs", *(m.label for m in icons.MEASURES)], tables.rows_of(old, shown, icons.MEASURES))


def _wrong(
    duel: stages.Duel, snapshot: Chosen, areas: Sequence[Mapping[str, Any]], drawn: Mapping[str, str], level: int
) -> Iterator[str]:
    prefix = f"wrong{level}_"
    yield from [f"## {level} % of captions exchanged", ""]
    arms = [arm for arm in duel.arms if arm.name.startswith(prefix)]
    if not arms:
        yield from ["Missing: no arm is retuned yet.", ""]
        return
    yield from _rows(duel, snapshot, prefix)
    if level != stages.LEVELS[0] and f"{prefix}xclip" not in {arm.name for arm in arms}:
        yield from ["xCLIP is not among the arms, which are the best on validation: nothing is claimed.", ""]
    base = _wrong_title(_base([arm.name for arm in arms], prefix))
    yield from tables.shown(drawn, f"wrong{level}", f"Difference from {base} with {level} % of captions exchanged")
    others = {f"{prefix}oracle": "those of clean captions", f"{prefix}shuffled": "those of xCLIP"}
    rows = [[arm.title, _settings_text(duel.retuned.get(arm.name, {})) or others[arm.name]] for arm in arms]
    yield from ["Chosen on validation, of four candidates each:", "", *table(["arm", "settings"], rows)]
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
    yield from _suspects(areas, prefix)
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


def _suspects(lines: Sequence[Mapping[str, Any]], prefix: str) -> Iterator[str]:
    """AUC by xCLIP's clusters minus AUC by losses: at the end, and each at the checkpoint with its best mean."""
    ours = _areas(lines, f"{prefix}xclip").get("clusters")
    rows = []
    for rival in ("clip", "smoothed", "xclip") if ours else ():
        if ours and (losses := _areas(lines, f"{prefix}{rival}").get("loss")):
            last = paired(ours[max(ours)], losses[max(losses)])
            best = paired(*(max(areas.values(), key=_mean) for areas in (ours, losses)))
            title = f"{stages.WRONG_TITLES[rival]}, its loss"
            rows.append([title, *(tables.difference_text(d, _AREA) for d in (last, best))])
    if rows:
        yield from ["AUC by xCLIP's clusters minus AUC by a loss, paired by seed; the end decides:", ""]
        yield from table(["minus", "at the end", "each at its best checkpoint"], rows)


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
