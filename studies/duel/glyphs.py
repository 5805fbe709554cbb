"""The second corpus: both winners of the duel and xCLIP without a teacher, unchanged, on glyphs; nothing is tuned."""

import dataclasses
from collections.abc import Iterator

from studies import claims, tables, verdicts
from studies.declaration import Claim, ClaimPart, Measure, Study
from studies.duel import stages
from studies.duel.chosen import BEST, Chosen
from studies.glyphs import recipe
from studies.matrix import Matrix, Snapshot
from xclip_jax.config.load import load_config

SEEDS = (0, 1, 2)
_FINALS = {"clip": "clip", "xclip": "xclip", "cheaper": "xclip"}  # objectives of the finals that are trained on glyphs
STAGE = stages.Stage("glyphs", "a second corpus: glyphs", len(_FINALS) * len(SEEDS), stages.FINAL_STEPS, tested=True)
_TITLE = "The winners on glyphs"
VALIDATION = tuple(f"glyphs/validation_{name}" for name in recipe.VALIDATION)
TESTS = tuple(f"glyphs/test_{name}" for name in recipe.TESTS)
_LABELS = {
    "concepts": "unseen characters",
    "combinations": "unseen combinations",
    "composition": "combinations among all names",
    "rendering": "unseen foundries",
    "retrieval": "retrieval",
    "probe": "linear probe",
    "scripts": "script probe",
    "aliases": "alias to name",
}
NAMED = dict(zip(VALIDATION, recipe.VALIDATION, strict=True))
_RANK = Measure("rank", "rank among unseen characters", "glyphs/test_concepts", "rank_gmean", higher=False, ratio=True)
MEASURES = (
    *(Measure(name, _LABELS[name], f"glyphs/test_{name}") for name in recipe.TESTS),
    _RANK,
    *(
        Measure(f"{name}{BEST}", f"{_LABELS[name]}, chosen similarity", f"glyphs/test_{name}")
        for name in NAMED.values()
    ),
    dataclasses.replace(_RANK, name=f"rank{BEST}", label=f"{_RANK.label}, chosen similarity"),
)


def study(duel: stages.Duel) -> Study | None:
    """Return the study of these arms, or None while the winners or their costs are not known.

    Steps, heads and settings are those of the finals, the ratio of steps as it was measured on icons.
    """
    finals = {arm.name: arm for arm in duel.arms}
    if not {"final_clip", "final_xclip"} <= finals.keys():
        return None
    arms = [
        dataclasses.replace(
            finals[f"final_{name}"],
            name=f"glyphs_{name}",
            recipe=f"{recipe.__file__}:objective={objective}",
            seeds=SEEDS,
        )
        for name, objective in _FINALS.items()
        if f"final_{name}" in finals
    ]
    clip, ours = (arm.name for arm in arms[:2])
    parts = (
        ClaimPart("names better", ours, clip, f"concepts{BEST}"),
        ClaimPart("has the better probe", ours, clip, "probe"),
    )
    claim = Claim("On glyphs too xCLIP's best names better and has better features than CLIP's best.", parts)
    choose = Measure(
        "choose", "rank among validation characters", VALIDATION[0], "rank_gmean", higher=False, ratio=True
    )
    return Study(
        title=_TITLE,
        about=(),
        arms=tuple(arms),
        changes=stages.CHANGES,
        validation=VALIDATION,
        tests=TESTS,
        choose=choose,
        measures=MEASURES,
        claims=(claim,),
        baseline=clip,
        named=NAMED,
        name="duel",
        seconds_per_pair=1.4e-3,
    )


def snapshot(duel: stages.Duel) -> Snapshot | None:
    """Return the finished runs on glyphs, or None while the winners are not known."""
    declared = study(duel)
    return Chosen(Matrix(declared, load_config), duel.records) if declared else None


def progress(duel: stages.Duel) -> tuple[stages.Stage, int, float]:
    """Return the stage, the number of its finished runs, and the hours that are left."""
    glyphs = snapshot(duel)
    done = claims.counts(glyphs)[0] if glyphs else 0
    return STAGE, done, STAGE.hours(STAGE.runs - done)


def missing(duel: stages.Duel, only: str = "") -> list[str]:
    """Return a line for each arm with runs missing, of arms whose names begin with `only`."""
    glyphs = snapshot(duel)
    runs = {arm.name: (len(glyphs.finished(arm.name)), len(arm.seeds)) for arm in glyphs.study.arms} if glyphs else {}
    return [
        f"{name}: {planned - done} of {planned} runs"
        for name, (done, planned) in runs.items()
        if done < planned and name.startswith(only)
    ]


def section(glyphs: Snapshot | None) -> Iterator[str]:
    """Yield the section of the page."""
    yield from ["## A second corpus: glyphs", ""]
    if glyphs is None:
        yield from ["Missing: the winners are not known yet.", ""]
        return
    arms = {arm.title: arm.name for arm in glyphs.study.arms}
    yield from tables.table(["arm", "runs", *(m.label for m in MEASURES)], tables.rows_of(glyphs, arms, MEASURES))
    yield from [f"{tables.difference_from(glyphs.study)}:", ""]
    yield from tables.from_baseline(glyphs, list(arms.values()), MEASURES)
    for judged in (verdicts.judge(glyphs, claim) for claim in glyphs.study.claims):
        yield from [claims.sentence(judged), "", *claims.parts_table(glyphs, judged)]
