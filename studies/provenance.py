"""The parts of a study's page that say what its numbers are of: measures, commits and devices, and how to repeat it."""

from collections.abc import Iterator

from studies.declaration import SECTIONS, Measure, Study
from studies.markdown import table
from studies.matrix import Snapshot
from xclip_jax.evaluators.result import Result

_RANKS = "Ranks: geometric means, lower is better; differences are ratios, below 1 is better."
_ROUNDED = 1e-3  # records are rounded
_UNITS = "Values are in percent, higher is better, and differences are percentage points, but for ranks and losses."


def measures(snapshot: Snapshot) -> Iterator[str]:
    """Yield the table of what is measured; items and chance are those of the records."""
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


def at_chance(snapshot: Snapshot) -> Iterator[str]:
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


def commits(snapshot: Snapshot) -> Iterator[str]:
    """Yield devices, versions, and a table of commits with the arms and seeds that are of them."""
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


def missing(snapshot: Snapshot) -> Iterator[str]:
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


def again(study: Study, title: str) -> list[str]:
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
