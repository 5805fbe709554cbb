"""The page of a study, study.md with its charts in study/, written from the run files alone."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from xclip_jax.storage import write_whole
from xclip_jax.study import charts, similarities, verdicts
from xclip_jax.study.declaration import SECTIONS, Arm, Measure, Study
from xclip_jax.study.markdown import (
    difference_text,
    estimate_text,
    mean_of,
    p_text,
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
_FINDINGS = 2  # claims that a README has room for
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
    missing, total = len(snapshot.missing()), len(snapshot.runs)
    if not any(snapshot.finished(arm.name) for arm in study.of_section("core")):
        return f"{link}: under way, {total - missing} of {total} runs are finished and none of the core."
    drawn = [f"![Differences to CLIP](docs/{study.page}/{name}.svg)", ""] if name in _charts(snapshot) else []
    judged = [verdicts.judge(snapshot, claim) for claim in study.claims[:_FINDINGS]]
    return "\n".join([*drawn, *(f"* {_sentence(claim)}" for claim in judged), "", f"{link}: all of it."])


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
        [f"# {study.title}", "", MADE.format(command=study.command, page=study.page), "", _progress(snapshot), ""],
        _claims(snapshot),
        ["## What was run", "", *(line for text in study.about for line in (text, ""))],
        _tuning(snapshot),
        _core(snapshot, drawn),
        similarities.section(snapshot),
        _controls(snapshot),
        _doses(snapshot, drawn),
        _factors(snapshot),
        _training(snapshot, drawn),
        _missing(snapshot),
        ["## Threats to validity", "", *(f"* {text}" for text in study.threats), ""],
        _again(study),
    ]
    return "\n".join(line for section in sections for line in section).rstrip() + "\n"


# --- sections


def _progress(snapshot: Snapshot) -> str:
    missing, total = len(snapshot.missing()), len(snapshot.runs)
    shared = "arms of one config share their runs"
    if missing:
        done = f"**{total - missing} of {total} runs of arms are finished** ({shared})."
        return f"{done} What is missing is listed below; each n is that of the files."
    return f"All {total} runs of arms are finished ({shared})."


def _claims(snapshot: Snapshot) -> Iterator[str]:
    yield from ["## Verdicts", ""]
    judged = [verdicts.judge(snapshot, claim) for claim in snapshot.study.claims]
    for number, claim in enumerate(judged, 1):
        yield from [f"{number}. {_sentence(claim)}", ""]
    for number, claim in enumerate(judged, 1):
        rows = []
        for part in claim.parts:
            d = part.difference
            arms = [snapshot.study.arm(name).title if name else "not chosen yet" for name in (part.a, part.b)]
            margin = f", margin {part.part.margin:g}" if part.part.margin else ""
            cells = (
                ["-"] * 4 if d is None else [str(d.n), f"{part.agreeing} of {d.n}", p_text(part.p), p_text(d.p_flip)]
            )
            rows.append([
                part.part.text + margin, f"{arms[0]} less {arms[1]}", part.measure.label,
                difference_text(d, part.measure), *cells, part.verdict,
            ])  # fmt: skip
        head = ["part", "arms", "measure", "difference, 95 %", "n", "seeds that agree", "p (t, Holm)", "p (sign flip)"]
        yield from [f"### Claim {number}", "", *table([*head, "verdict"], rows)]
    yield from ["The rule, fixed before the runs:", "", verdicts.RULE, ""]


def _sentence(claim: verdicts.ClaimVerdict) -> str:
    """What a claim earns: its words, the verdict, and what each of its parts shows, by verdict where these differ."""
    shown = {verdicts.HOLDS: "Shown", verdicts.FAILS: "Refuted", verdicts.UNDECIDED: "Undecided"}
    groups = {}
    for verdict, word in shown.items():
        texts = []
        for part in (part for part in claim.parts if part.verdict == verdict):
            d = part.difference
            numbers = "no runs" if d is None else f"{difference_text(d, part.measure)}, {part.agreeing} of {d.n} seeds"
            texts.append(f"{part.part.text} ({numbers})")
        groups |= {word: "; ".join(texts)} if texts else {}
    words = "undecided at this scale" if claim.verdict == verdicts.UNDECIDED else claim.verdict
    details = list(groups.values()) if len(groups) == 1 else [f"{word}: {texts}" for word, texts in groups.items()]
    return f"\u201c{claim.claim.text}\u201d **{words.capitalize()}**: {'. '.join(details)}."


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
    records = list(snapshot.records.values())
    facts = {
        "Devices": {str(r.environment.get("devices")) for r in records},
        "Commits": {r.commit for r in records},
        "Versions": {
            ", ".join(f"{k} {v}" for k, v in sorted(dict(r.environment.get("versions", {})).items())) for r in records
        },
    }
    for name, values in facts.items():
        if values:
            yield f"{name}: {'; '.join(sorted(values))}."
            yield ""


def _missing(snapshot: Snapshot) -> Iterator[str]:
    yield from ["## Missing runs", ""]
    missing: dict[str, list[int]] = {}
    for run in snapshot.missing():
        missing.setdefault(run.arm.name, []).append(run.seed)
    if not missing:
        yield "None."
    for section in SECTIONS:
        arms = [arm for arm in snapshot.study.of_section(section) if arm.name in missing]
        texts = [f"`{arm.name}` ({', '.join(map(str, missing[arm.name]))})" for arm in arms]
        if texts:
            yield f"* {section}, arms with seeds: {', '.join(texts)}"
    yield ""
    errors = [f"* `{r.arm}`, seed {r.seed}: {r.error}" for r in snapshot.records.values() if r.error]
    if errors:
        yield from ["Runs that diverged have no results:", "", *errors, ""]
    if unused := snapshot.unused():
        names = ", ".join(f"`{record.file_name}`" for record in unused)
        yield from [f"Run files of no arm of the present declaration, which are not used: {names}.", ""]


def _again(study: Study) -> list[str]:
    flags = {
        "--dry-run": "the matrix, what is done, hours that are left",
        "": "runs what has no file, and writes this page",
        "--page": "this page alone",
    }
    return [
        "## Run it again",
        "",
        "```",
        *(f"{study.command} {flag:<9}    # {text}" for flag, text in flags.items()),
        "```",
        "",
        f"A run is one file in `docs/{study.page}/runs`, recognised by its config: delete it to run it again. After a "
        "kill the same command goes on, also in another checkout that has the files.",
    ]


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
