"""The parts of a study's page that subtract arms from one another: controls, tuned settings, secondary measures."""

from collections.abc import Iterator, Sequence

from studies import similarities, verdicts
from studies.declaration import Dose, Measure, Study
from studies.markdown import interval_text, rows_of, signed_text, table
from studies.matrix import Snapshot
from studies.statistics import MIN_SEEDS, holm, p_above

Contrast = tuple[str, str, str]  # arm or choice, what is subtracted, what the difference shows
_RUN_COLUMNS = ("arm", "runs")


def controls(snapshot: Snapshot) -> Iterator[str]:
    """Yield the controls: their scores, which gains are beyond them, and the differences."""
    study = snapshot.study
    if not study.controls:
        return
    names = [b for _, b, _ in study.controls]
    yield from ["## Controls", "", *_scores(snapshot, names, study.measures)]
    yield from [f"{difference_from(study)}:", "", *from_baseline(snapshot, names, study.measures)]
    yield from ["What xCLIP gains over the controls:", "", *_differences(snapshot, study.controls)]
    yield from _survivors(snapshot, study.controls)
    yield from similarities.controls(snapshot)


def sought(snapshot: Snapshot) -> Iterator[str]:
    """Yield what arms whose setting was sought by the factors are worth."""
    study = snapshot.study
    if not study.sought:
        return
    yield from ["## The setting tuned on validation", ""]
    yield from _scores(snapshot, [a for a, _, _ in study.sought], study.measures)
    yield from _differences(snapshot, study.sought)
    if study.sought_controls:
        yield from ["Against controls:", "", *_differences(snapshot, study.sought_controls)]
        yield from _survivors(snapshot, study.sought_controls)


def secondary(snapshot: Snapshot) -> Iterator[str]:
    """Yield the measures that have no part in a verdict, for the arms of the core and those that were sought."""
    study = snapshot.study
    if not study.secondary:
        return
    yield from ["## More measures", "", "Other numbers of the same tests, without a verdict.", ""]
    names = [*(arm.name for arm in study.of_section("core")), *dict.fromkeys(a for a, _, _ in study.sought)]
    yield from _scores(snapshot, names, study.secondary)
    yield from [f"{difference_from(study)}:", "", *from_baseline(snapshot, names, study.secondary)]


def difference_from(study: Study, baseline: str = "") -> str:
    """ "Difference from CLIP, paired by seed"."""
    return f"Difference from {study.arm(baseline or study.baseline).title}, paired by seed"


def from_baseline(
    snapshot: Snapshot, names: Sequence[str], measures: Sequence[Measure], baseline: str = ""
) -> list[str]:
    """Return a table of the differences of these arms from `baseline`, the study's by default, which is left out."""
    study, baseline = snapshot.study, baseline or snapshot.study.baseline
    others = [name for name in names if name != baseline]
    rows = [[study.arm(name).title, *_cells(snapshot, name, baseline, measures)] for name in others]
    return table(["arm", *(measure.label for measure in measures)], rows)


def _scores(snapshot: Snapshot, names: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Finished runs and means of these arms, each once."""
    arms = {snapshot.study.arm(name).title: name for name in names}
    return table([*_RUN_COLUMNS, *(measure.label for measure in measures)], rows_of(snapshot, arms, measures))


def _cells(snapshot: Snapshot, a: str | None, b: str | None, measures: Sequence[Measure]) -> list[str]:
    pairs = [verdicts.difference(snapshot, a, b, m) if a and b else None for m in measures]
    return [signed_text(d, m) for d, m in zip(pairs, measures, strict=True)]


def of_dose(snapshot: Snapshot, dose: Dose) -> list[str]:
    """Return the differences from the controls of a dose, none without any."""
    if not dose.controls:
        return []
    measures = [snapshot.study.measure(name) for name in dose.measures]
    return ["Against controls:", "", *_differences(snapshot, dose.controls, measures, unpaired=True)]


def _differences(
    snapshot: Snapshot,
    contrasts: Sequence[Contrast],
    measures: Sequence[Measure] | None = None,
    *,
    unpaired: bool = False,
) -> list[str]:
    """A table of differences; with `unpaired` cells have Welch's interval too."""
    study, rows = snapshot.study, []
    measures = study.measures if measures is None else measures
    for a, b, meaning in contrasts:
        left, right = snapshot.choice(a), snapshot.choice(b)
        names = [study.arm(name).title if name else "not chosen yet" for name in (left, right)]
        cells = _cells(snapshot, left, right, measures)
        if unpaired and left and right:
            welch = (interval_text(verdicts.unpaired(snapshot, [left], [right], m), m) for m in measures)
            cells = [f"{cell}; unpaired {text}" if text else cell for cell, text in zip(cells, welch, strict=True)]
        rows.append([f"{names[0]} − {names[1]}", meaning, *cells])
    return table(["difference", "what it shows", *(measure.label for measure in measures)], rows)


def _survivors(snapshot: Snapshot, contrasts: Sequence[Contrast]) -> Iterator[str]:
    """For each measure the controls over which there is a gain, by p after Holm's correction over the controls."""
    study = snapshot.study
    floor = f"; {study.arm(study.floor).title} is left out" if study.floor in [b for _, b, _ in contrasts] else ""
    yield (
        "The intervals are not corrected for their number. Gains with p below 0.05 by the paired t-test after Holm's "
        f"correction over the controls of a measure ({MIN_SEEDS} seeds or more{floor}):"
    )
    yield ""
    nothing, compared = [], False
    for measure in study.measures:
        shown = gains(snapshot, contrasts, measure)
        compared = compared or shown is not None
        if shown:
            yield f"* {measure.label}: {'; '.join(shown)}"
        elif shown is not None:
            nothing.append(measure.label)
    if nothing:
        yield f"* over no control: {'; '.join(nothing)}"
    if not compared:
        yield "* no control has the runs yet"
    yield ""


def gains(snapshot: Snapshot, contrasts: Sequence[Contrast], measure: Measure) -> list[str] | None:
    """Return what differences from controls show of a measure, of those on the better side; None without the runs."""
    side, p, meanings = 1 if measure.higher else -1, [], []
    real = [contrast for contrast in contrasts if contrast[1] != snapshot.study.floor]
    for a, b, meaning in real:
        left, right = snapshot.choice(a), snapshot.choice(b)
        d = verdicts.difference(snapshot, left, right, measure) if left and right else None
        if d and d.n >= MIN_SEEDS:
            p.append(min(1.0, 2 * p_above(side * d.mean, d.standard_error, d.n)))
            meanings.append(meaning)
    # Controls without runs count as if nothing were shown by them.
    corrected = holm([*p, *[1.0] * (len(real) - len(p))])[: len(p)]
    return (
        [meaning for meaning, value in zip(meanings, corrected, strict=True) if value < verdicts.ALPHA] if p else None
    )
