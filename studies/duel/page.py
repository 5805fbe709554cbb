"""The page of the duel, made from its records: what is missing is shown as missing."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from studies import charts, claims, records, tables, verdicts
from studies.declaration import Arm, Claim, ClaimPart, Measure
from studies.duel import glyphs, sections, spaces, stages, wrong
from studies.duel.chosen import BEST, Chosen
from studies.icons import study as icons
from studies.matrix import Matrix, Snapshot
from studies.page import write_page
from studies.statistics import MIN_SEEDS, seeds_needed
from studies.tables import table
from xclip_jax.config.load import load_config

NAMED = dict(zip(icons.VALIDATION, ("zeroshot", "rendering"), strict=True))
_OLD_RUNS = pathlib.Path(icons.__file__).with_name("runs.jsonl")
_OLD = ("clip_steps4000", "clip_steps4000_longer", "xclip_steps4000")
# Finals that ran side by side, a core each.
_NEIGHBOURS = (("xclip", "clip"), ("distilled", "second"), ("superclip", "shuffled"), ("cheaper", "positives"))
MOST_SEEDS = 100
_EACH_RIVAL = "With 25 % of captions exchanged xCLIP is better than each rival retuned for it."
_SMOOTHED = "With 25 % of captions exchanged xCLIP is better than CLIP with label smoothing."
_AT_HALF = "With 50 % of captions exchanged xCLIP is better than the other three of the best four arms."
_MADE = (
    "Made by `python -m studies duel --page` from the records in `studies/duel`; a test holds it current. What was "
    "declared before the runs, and why, is in `studies/duel/study.md`."
)


def measures() -> tuple[Measure, ...]:
    """The first study's measures, and naming by the similarity that is best on validation for each arm."""
    chosen = []
    for measure in icons.MEASURES:
        if measure.name in (*NAMED.values(), "rank"):
            what = f"{measure.what}; by the similarity or mixture that is best for an arm on validation"
            label = f"{measure.label}, chosen similarity"
            chosen.append(dataclasses.replace(measure, name=f"{measure.name}{BEST}", label=label, what=what))
    return (*icons.MEASURES, *chosen)


def _against(a: str, others: Sequence[str], names: set[str], prefix: str) -> tuple[ClaimPart, ...]:
    """Parts: arm `a` is better than each of the others that is declared, at naming and at the probe."""
    titles = {**spaces.WRONG_TITLES, **spaces.RIVALS}
    what = {"zeroshot_best": "names better", "probe": "has the better probe"}
    rivals = [b for b in others if f"{prefix}{b}" in names and a in names]
    return tuple(ClaimPart(f"{what[m]} than {titles[b]}", a, f"{prefix}{b}", m) for b in rivals for m in what)


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
        if parts := _against(ours, ("shuffled", *spaces.RIVALS), names, "final_"):
            text = "xCLIP's gain is more than other terms of equal cost, or shuffled pseudo-labels, give."
            declared.append(Claim(text, parts))
    for level, count in zip(stages.LEVELS, (1 + len(wrong.RIVALS), stages.BEST_AT_HALF), strict=True):
        ours, prefix = f"wrong{level}_xclip", f"wrong{level}_"
        if ours in names and len({ours, *(prefix + name for name in wrong.RIVALS)} & {*names}) == count:
            texts = (
                {_EACH_RIVAL: wrong.RIVALS, _SMOOTHED: ("smoothed",)}
                if level == stages.LEVELS[0]
                else {_AT_HALF: wrong.RIVALS}
            )
            declared += [Claim(text, _against(ours, rivals, names, prefix)) for text, rivals in texts.items()]
    return tuple(declared)


def snapshot_of(duel: stages.Duel, load: Any = load_config) -> Chosen:
    """Return the finished runs of all that is declared."""
    names = [arm.name for arm in duel.arms]
    finals = [name for name in names if name.startswith("final_")]
    shown = ([name for name in finals if name != "final_clip"], ("zeroshot_best", "rendering_best", "probe"))
    baseline = "final_clip" if finals else names[0]
    added = {f"wrong{stages.LEVELS[-1]}_{arm}" for arm in duel.added}
    study = stages.study_of(
        duel.arms, measures=measures(), named=NAMED, baseline=baseline, shown=shown if finals else ((), ()),
        claims=duel_claims([arm for arm in duel.arms if arm.name not in added]),
    )  # fmt: skip
    return Chosen(stages.DuelMatrix(study, load), duel.records)


def write(docs: pathlib.Path, duel: stages.Duel, areas: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Write duel.md and its charts, duel/*.svg, into a folder of documents, and return the page's path."""
    snapshot = snapshot_of(duel)
    svgs = (charts.of_study(snapshot) | wrong.own_charts(snapshot, areas)) if snapshot.records else {}
    return write_page(docs, "duel", svgs, lambda drawn: render(duel, snapshot, areas, drawn))


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
        _open(duel, snapshot),
        sections.heads(duel),
        sections.teams(duel),
        _finals(duel, snapshot, drawn),
        *(wrong.section(duel, snapshot, areas, drawn, level) for level in stages.LEVELS),
        glyphs.section(glyphs.snapshot(duel)),
        claims.section(snapshot) if snapshot.study.claims else [],
        _changes(snapshot) if snapshot.study.claims else [],
        ["## Missing", "", *(f"* {line}" for line in [*duel.missing(), *glyphs.missing(duel)] or ["nothing"])],
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _open(duel: stages.Duel, snapshot: Chosen) -> Iterator[str]:
    """The claim on glyphs, and those that cannot be judged before their arms are declared."""
    declared = {claim.text for claim in snapshot.study.claims}
    at_half = [arm.name for arm in duel.arms if arm.name.startswith(f"wrong{stages.LEVELS[-1]}_")]
    texts = (_EACH_RIVAL, _SMOOTHED, *([] if at_half else [_AT_HALF]))
    lines = [f"*{text}* **Open**: its arms are not retuned yet." for text in texts if text not in declared]
    if second := glyphs.snapshot(duel):
        lines += [claims.sentence(verdicts.judge(second, claim)) for claim in second.study.claims]
    for line in lines:
        yield from [f"* {line}", ""]


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
                needed = [f"{d.high - d.mean - margin:+.1f}", str(max(seeds, MIN_SEEDS) if seeds else none)]
            cells = [f"{number}. {part.part.text}", tables.difference_text(d, part.measure), part.verdict]
            rows.append([*cells, *needed])
    yield from ["## What would have changed a verdict", ""]
    yield "*On its side from*: the mean difference, in points, from which the interval of a part is on the claimed"
    yield "side, with the scatter over seeds that was measured and before Holm's correction. *Seeds*: how many are"
    yield f"needed to show the measured mean with a power of 80 %, at least {MIN_SEEDS}."
    yield from ["", *table(["part", "difference, 95 %", "verdict", "on its side from", "seeds"], rows)]


def _progress(duel: stages.Duel) -> list[str]:
    rows = [
        [stage.title, f"`{stage.prefix}`", str(stage.runs), str(done), str(stage.steps), f"{hours:.1f}"]
        for stage, done, hours in (*duel.progress(), glyphs.progress(duel))
    ]
    return table(["stage", "arms", "runs", "done", "steps of CLIP's clock", "hours of two cores left"], rows)


def _finals(duel: stages.Duel, snapshot: Chosen, drawn: Mapping[str, str]) -> Iterator[str]:
    yield from ["## The winners at equal cost, and controls", ""]
    arms = [arm.name for arm in duel.arms if arm.name.startswith("final_")]
    if not arms:
        yield from ["Missing: the winners are not known yet.", ""]
        return
    yield from sections.stage_table(duel, snapshot, "final_")
    yield from [f"{tables.difference_from(snapshot.study)}:", ""]
    yield from tables.from_baseline(snapshot, arms, measures())
    yield from _times(snapshot)
    yield from tables.shown(drawn, charts.CURVES[0][0], charts.CURVES[0][1])
    yield from ["The first study's runs of 4,000 steps, with its recipes and heads:", ""]
    old = Snapshot(Matrix(icons.study(), load_config), records.read_all(_OLD_RUNS))
    shown = {old.study.arm(name).title: name for name in _OLD}
    yield from table(["arm", "runs", *(m.label for m in icons.MEASURES)], tables.rows_of(old, shown, icons.MEASURES))


def _times(snapshot: Chosen) -> Iterator[str]:
    """How long finals that ran side by side trained, over each other, by seed: neighbours shared the machine."""
    rows, titles = [], {arm.name: arm.title for arm in snapshot.study.arms}
    for names in _NEIGHBOURS:
        pair = [f"final_{name}" for name in names]
        if not titles.keys() >= {*pair}:
            continue
        seconds = [{seed: run.seconds["training"] for seed, run in snapshot.finished(arm).items()} for arm in pair]
        ratios = [x / y for seed, x in seconds[0].items() if x and (y := seconds[1].get(seed))]
        if ratios:
            spread = f"{min(ratios):.3f}, {max(ratios):.3f}"
            rows.append([*(titles[arm] for arm in pair), f"{np.median(ratios):.3f}", spread])
    if rows:
        yield from ["Equal time, checked: training time of runs that ran beside each other, a core each.", ""]
        yield from table(["arm", "beside", "time over its neighbour's: median", "least and most"], rows)
