"""The page of a study, study.md with its charts in study/, written from the records."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from studies import charts, claims
from studies.declaration import SECTIONS, Arm, Measure, Study
from studies.matrix import Snapshot
from studies.tables import (
    controls,
    difference_from,
    doses,
    estimate_text,
    from_baseline,
    mean_of,
    rows_of,
    runs_text,
    secondary,
    shown,
    similarities,
    table,
    titles_of,
    tuned,
)
from xclip_jax.config import schema
from xclip_jax.core.storage import write_whole
from xclip_jax.evaluators.results import Result

MADE = "Made by `{command} --page` from `studies/{name}/runs.jsonl`; a test holds it current."
START, END = "<!-- study: made by python -m studies --page -->", "<!-- /study -->"
_RUN_COLUMNS = ("arm", "runs")


def write(docs: pathlib.Path, snapshot: Snapshot) -> pathlib.Path:
    """Write the page and its charts into a folder of documents, delete charts that it has no more; return its path."""
    return write_page(docs, "study", charts.of_study(snapshot), lambda drawn: render(snapshot, drawn))


def write_page(
    docs: pathlib.Path, name: str, svgs: Mapping[str, str], text: Callable[[Mapping[str, str]], str]
) -> pathlib.Path:
    """Write NAME.md and its charts, NAME/*.svg, delete charts that it has no more, and return the page's path.

    Args:
      docs: folder of documents.
      name: of the page.
      svgs: {name: SVG} of its charts.
      text: gives the page, from the paths of charts by name.
    """
    page, folder = docs / f"{name}.md", docs / name
    (folder if svgs else docs).mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.stem not in svgs:
            path.unlink()
    for chart, svg in svgs.items():
        write_whole(epath.Path(folder / f"{chart}.svg"), svg)
    write_whole(epath.Path(page), text({chart: f"{name}/{chart}.svg" for chart in svgs}))
    return page


def finding(snapshot: Snapshot) -> str:
    """Return what a README says of the study: a plot and the sentences that the first claims earn."""
    study, name = snapshot.study, "finding"
    link = f"[{study.title}](docs/study.md)"
    if not any(snapshot.finished(arm.name) for arm in study.of_section("core")):
        done, missing = claims.counts(snapshot)
        return f"{link}: under way, {done} of {done + missing} runs are finished and none of the core."
    drawn = [f"![Differences from CLIP](docs/study/{name}.svg)", ""] if name in charts.of_study(snapshot) else []
    return "\n".join([*drawn, *claims.findings(snapshot), "", f"{link}: all of it."])


def write_finding(readme: pathlib.Path, snapshot: Snapshot) -> None:
    """Replace what stands between the marks of the study in a README; nothing, where it lacks one of them."""
    before, mark, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if mark and end:
        write_whole(epath.Path(readme), f"{before}{mark}\n{finding(snapshot)}\n{end}{after}")


def render(snapshot: Snapshot, drawn: Mapping[str, str]) -> str:
    """Return the page; `drawn` has the paths of its charts by name."""
    study, begun = snapshot.study, claims.counts(snapshot)[0] > 0
    sections: list[Iterator[str] | Sequence[str]] = [
        [f"# {study.title}", "", MADE.format(command=study.command, name=study.name), ""],
        [claims.progress(snapshot), ""],
        [] if begun else _again(study, "Run it"),
        claims.summary(snapshot, drawn),
        ["## Threats to validity", "", *(f"* {text}" for text in study.threats), ""],
        ["## What was run", "", *(line for text in study.about for line in (text, ""))],
        _measures(snapshot),
        _core(snapshot, drawn),
        controls(snapshot),
        tuned(snapshot),
        similarities(snapshot),
        doses(snapshot, drawn),
        _factors(snapshot),
        claims.section(snapshot),
        _tuning(snapshot),
        secondary(snapshot),
        _training(snapshot, drawn),
        _missing(snapshot),
        _again(study, "Run it again") if begun else [],
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
        if best and (edges := _extremes(best.changes, [arm.changes for arm in arms])):
            yield from [f"At the edge of what was tried: {', '.join(edges)}.", ""]


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
    yield from [f"{difference_from(study)} (x/n: how many of n are above zero):", ""]
    yield from from_baseline(snapshot, [arm.name for arm in study.of_section("core")], study.measures)
    yield from _at_chance(snapshot)
    yield from shown(drawn, "weights", "Differences over the weight of nCLIP")
    if any(map(snapshot.finished, study.common.values())):
        yield from ["### All at one recipe", ""]
        yield from [f"{_common_recipe(snapshot)}.", ""]
        yield from table(head[:-1], rows_of(snapshot, study.common, study.measures))
        if baseline := study.common.get(study.arm(study.baseline).title):
            yield from [f"{difference_from(study, baseline)}:", ""]
            yield from from_baseline(snapshot, tuple(study.common.values()), study.measures, baseline)


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
    """Keys that a search's best candidate changed, and for which it has the smallest or the largest value tried."""
    candidates = [arm for arm in snapshot.study.of_section("factors") if arm.objective == best.objective]
    own = next(arm for arm in candidates if arm.name == best.name).changes
    names = {arm.name for arm in candidates}
    return _extremes(own, [schema.flatten(run.config.to_dict()) for run in snapshot.runs if run.arm.name in names])


def _training(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    yield from ["## Training", ""]
    for name, title, *_ in charts.CURVES:
        yield from shown(drawn, name, title)
    yield from _clusters(snapshot)
    yield from _commits(snapshot)


def _clusters(snapshot: Snapshot) -> Iterator[str]:
    """Metrics of the last step of arms that have them: how the clusters ended."""
    metrics = [measure for measure in snapshot.study.factors if not measure.set]
    arms = titles_of(snapshot, "core") | titles_of(snapshot, "controls")
    ended = {title: arm for title, arm in arms.items() if any(mean_of(snapshot, arm, measure) for measure in metrics)}
    if ended:
        yield from ["Clusters in the last step's batch:", ""]
        head = [*_RUN_COLUMNS, *(measure.label for measure in metrics)]
        yield from table(head, rows_of(snapshot, ended, metrics))


# --- provenance

_RANKS = "Ranks: geometric means, lower is better; differences are ratios, below 1 is better."
_ROUNDED = 1e-3  # records are rounded
_UNITS = "Values are in percent, higher is better, and differences are percentage points, but for ranks and losses."


def _measures(snapshot: Snapshot) -> Iterator[str]:
    """Yield the table of measures, with the numbers of items and the chance levels that the records have."""
    study = snapshot.study
    rows = []
    for measure in study.measures:
        result = _result(snapshot, measure)
        items = f"{result.n:,}" if result and result.n else "-"
        rows.append([measure.label, measure.what or f"`{measure.set or measure.metric}`", items, _chance(result)])
    yield from ["### Measures", "", *table(["measure", "what", "items", "chance"], rows)]
    yield from [_UNITS, ""]
    if any(measure.ratio for measure in study.measures):
        yield from [_RANKS, ""]


def _result(snapshot: Snapshot, measure: Measure) -> Result | None:
    """A result of the measure; items and chance are the same in all runs."""
    of_set = (r for record in snapshot.records.values() for r in record.results if measure.set and r.set == measure.set)
    return next((r for r in of_set if (r.key == measure.metric if measure.metric else r.headline)), None)


def _at_chance(snapshot: Snapshot) -> Iterator[str]:
    """Yield which runs of the core and the controls are at chance at a measure, as of a probe that learned nothing."""
    study, texts = snapshot.study, []
    for measure in (measure for measure in study.measures if measure.higher and not measure.ratio):
        result = _result(snapshot, measure)
        if result is None or result.chance is None:
            continue
        arms = (*study.of_section("core"), *study.of_section("controls"))
        values = {arm.title: snapshot.values(arm.name, measure) for arm in arms}
        runs = [
            f"{title}, seed {seed}"
            for title, of_arm in values.items()
            for seed, value in of_arm.items()
            if value <= result.chance + _ROUNDED
        ]
        texts += [f"{measure.label} ({'; '.join(runs)})"] if runs else []
    if texts:
        yield from [f"Runs at chance, which are in all means: {', '.join(texts)}.", ""]


def _chance(result: Result | None) -> str:
    if result is None or result.chance is None:
        return "-"
    return f"{result.chance:.1f}" if result.chance >= 1 else f"{result.chance:.1g}"


def _commits(snapshot: Snapshot) -> Iterator[str]:
    """Yield devices, versions, and a table of commits with the arms and seeds that ran on each."""
    records = list(snapshot.records.values())
    facts = {
        "Devices": {str(r.environment.get("devices")) for r in records},
        "Versions": {
            ", ".join(f"{k} {v}" for k, v in sorted(dict(r.environment.get("versions", {})).items())) for r in records
        },
    }
    for name, values in facts.items():
        if values:
            yield from [f"{name}: {'; '.join(sorted(values))}.", ""]
    made: dict[str, dict[str, list[int]]] = {}
    for record in sorted(records, key=lambda r: (SECTIONS.index(r.section), r.seed)):
        made.setdefault(record.commit, {}).setdefault(record.arm, []).append(record.seed)
    rows = [
        [_short(commit), ", ".join(f"`{arm}` ({', '.join(map(str, seeds))})" for arm, seeds in arms.items())]
        for commit, arms in made.items()
    ]
    if rows:
        yield "Commits of the code; an arrow where a run was resumed, or ended, with other code than it began with."
        yield from [snapshot.study.commits, ""] if snapshot.study.commits else [""]
        yield from table(["commit", "arms and seeds"], rows)


def _short(commits: str) -> str:
    """ "a1b2c3d4 → e5f6a7b8" of the commits of a run, one after the other."""
    parts = [commit.partition("-") for commit in commits.split(", ")]
    return " \u2192 ".join(f"{name[:8]}{dash}{rest}" for name, dash, rest in parts)


def _missing(snapshot: Snapshot) -> Iterator[str]:
    """Yield the runs that are missing, those that diverged, and records that belong to no arm."""
    yield from ["## Missing runs", ""]
    seeds: dict[str, list[int]] = {}
    for run in snapshot.missing():
        seeds.setdefault(run.arm.name, []).append(run.seed)
    if not seeds:
        yield "None."
    for name in SECTIONS:
        arms = [arm for arm in snapshot.study.of_section(name) if arm.name in seeds]
        texts = [f"`{arm.name}` ({', '.join(map(str, seeds[arm.name]))})" for arm in arms]
        if texts:
            yield f"* {name}, arms with seeds: {', '.join(texts)}"
    yield ""
    errors = [f"* `{r.arm}`, seed {r.seed}: {r.error}" for r in snapshot.records.values() if r.error]
    if errors:
        yield from ["Runs that diverged have no results:", "", *errors, ""]
    if unused := snapshot.unused():
        names = ", ".join(f"`{record.arm}`, seed {record.seed}" for record in unused)
        yield from [f"Records of no arm of the present declaration, which are not used: {names}.", ""]


def _again(study: Study, title: str) -> list[str]:
    """Return the section that says how to make or repeat the study."""
    flags = {
        "--dry-run": "the matrix, what is done, hours that are left",
        "": "runs what has no record, and writes this page",
        "--page": "this page alone",
    }
    return [
        f"## {title}",
        "",
        "```",
        *(f"{study.command} {flag:<9}    # {text}" for flag, text in flags.items()),
        "```",
        "",
        f"A run is one line of `studies/{study.name}/runs.jsonl`, recognised by its config, and is not made again "
        "while it is there, so that tests are read once. After a kill the same command goes on, also in another "
        "checkout that has the file. With `--docs` and an empty folder all runs are made again, and recorded and shown "
        "there.",
        "",
    ]
