"""The sections of the duel's page on the search, and tables that several sections have."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from studies import tables
from studies.declaration import Arm
from studies.duel import spaces, stages
from studies.duel.chosen import Chosen
from studies.tables import table

_HEAD = ("runs", "naming on validation, rank", "probe on validation")
_NAMING = (
    "*Naming on validation* is the geometric mean of the rank of the right name, 1 at best, by the best of a model's "
    "similarities. A *rate* is a multiple of 4e-3 with Muon and of 2e-3 with AdamW."
)
_TYPICAL = (
    "What the choice of settings costs an objective: candidates of rung 1, each once. The teams' candidates differ in "
    "more than xCLIP's own keys, so that they cannot be paired."
)


def _cells(duel: stages.Duel, arm: Arm) -> list[str]:
    """Finished runs, and the two measures of all choices."""
    values = duel.values(arm)
    shown = ["missing", "missing"] if values is None else [f"{np.exp(-values[0]):.2f}", f"{values[1]:.1f}"]
    return [f"{duel.done(arm)} of {len(arm.seeds)}", *shown]


def heads(duel: stages.Duel) -> Iterator[str]:
    """Yield the section on the cost and choice of a cluster head."""
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


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return "warmup 0.3, target ema"."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in settings.items())  # fmt: skip


def teams(duel: stages.Duel) -> Iterator[str]:
    """Yield the section on both teams' candidates."""
    yield from [
        "## Two teams",
        "",
        "Candidates by the mean of their ranks at both measures, the best first.",
        _NAMING,
        "",
    ]
    yield from _typical(duel)
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
                settings = settings_text(spaces.candidates(team)[index])
                rows.append([f"{index + 1}{mark}", settings, *_cells(duel, arms[name])])
            yield from [f"Rung {number}, {stages.RUNGS[number - 1].steps} steps:", ""]
            yield from table(["candidate", "settings", *_HEAD], rows)


def _typical(duel: stages.Duel) -> Iterator[str]:
    """The median and the worst candidate of each team's first rung."""
    rows = []
    for team in spaces.SPACES:
        arms = [arm for arm in duel.arms if arm.name.startswith(f"rung1_{team}_")]
        with_muon = [arm for arm in arms if arm.changes["optim.name"] == "muon"]
        for which, some in (("all", arms), ("with Muon", with_muon)):
            values = np.array([values for arm in some if (values := duel.values(arm))])
            if len(values) < len(some) or not some:
                continue
            ranks, probes = np.exp(-values[:, 0]), values[:, 1]
            cells = (np.median(ranks), ranks.max(), np.median(probes), probes.min())
            rows.append(
                [f"{team}, {which}", str(len(some)), *(f"{x:.{d}f}" for x, d in zip(cells, (2, 2, 1, 1), strict=True))]
            )
    if rows:
        head = ["candidates", "number", "naming, rank: median", "worst", "probe: median", "worst"]
        yield from [_TYPICAL, "", *table(head, rows)]


def stage_table(duel: stages.Duel, snapshot: Chosen, prefix: str) -> list[str]:
    """Return a table of the declared arms of a stage: steps, finished runs and all measures."""
    arms = [arm for arm in duel.arms if arm.name.startswith(prefix)]
    measures = snapshot.study.measures
    rows = tables.rows_of(snapshot, {arm.title: arm.name for arm in arms}, measures)
    for row, arm in zip(rows, arms, strict=True):
        row.insert(1, str(arm.changes["steps"]))
    return table(["arm", "steps", "runs", *(m.label for m in measures)], rows)


def retuning(duel: stages.Duel, level: int) -> Iterator[str]:
    """Yield what was tried of each arm under wrong captions, and which settings were chosen."""
    prefix = f"wrong{level}_"
    rows = []
    for arm, team in ((arm, spaces.team_of(arm)) for arm in spaces.WRONG):
        arms = [each for each in duel.arms if each.name.startswith(f"tune{level}_{arm}_")]
        candidates = spaces.retuned(arm, spaces.candidates(team)[duel.winners[team]]["rate"]) if arms else []
        for candidate, settings in zip(arms, candidates, strict=True):
            mark = " **chosen**" if duel.retuned.get(f"{prefix}{arm}") == settings else ""
            title = spaces.WRONG_TITLES[arm]
            rows.append([title, f"{settings_text(settings)}{mark}", *_cells(duel, candidate)])
    yield from [f"Retuning, {stages.RETUNING_STEPS} steps of each candidate:", ""]
    yield from table(["arm", "settings", *_HEAD], rows)
    declared = {arm.name for arm in duel.arms}
    followers = [name for name in spaces.FOLLOWERS if f"{prefix}{name}" in declared]
    of = {"shuffled": "as xCLIP", "oracle": "as CLIP's winner with right captions",
          "cheaper": "rate, warm-up and tau of xCLIP, the rest of its runner-up"}  # fmt: skip
    texts: Sequence[str] = [f"{spaces.WRONG_TITLES[name]}: {of[name]}" for name in followers]
    yield from [f"Not searched for: {'; '.join(texts)}.", ""] if texts else []
