"""The part of a study's page on doses: what becomes of the arms' difference as one thing changes."""

import math
from collections.abc import Iterator, Mapping, Sequence

from studies import contrasts, verdicts
from studies.declaration import Dose, Measure
from studies.markdown import diverged_text, estimate_text, interval_text, mean_of, shown, signed_text, table
from studies.matrix import Snapshot
from studies.statistics import Difference, Estimate, paired

_TEXT = (
    "Differences and their changes are paired by seed. With fewer than five seeds a paired interval can be narrow by "
    "chance: below each stands Welch's, which takes runs as independent."
)


def section(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    """Yield for each dose its tables, with how the difference changes from the first level, and its chart."""
    if not snapshot.study.doses:
        return
    yield from ["## Dose and response", "", _TEXT, ""]
    for dose in snapshot.study.doses:
        yield from [f"### {dose.title}", ""]
        if not compared(snapshot, dose):
            yield from ["Nothing to compare yet: see [what is missing](#missing-runs).", ""]
            continue
        for measure in map(snapshot.study.measure, dose.measures):
            rows = [[name, *(_cell(snapshot, arm, measure) for arm in arms)] for name, arms in dose.lines.items()]
            if len(dose.lines) == 2:
                (first, a), (second, b) = dose.lines.items()
                name, levels = f"{second} − {first}", list(zip(a, b, strict=True))
                by_seed = [verdicts.difference(snapshot, y, x, measure) for x, y in levels]
                welch = [verdicts.unpaired(snapshot, [y], [x], measure) for x, y in levels]
                rows += _rows(name, by_seed, welch, measure)
                (x0, y0), *others = levels
                by_seed = [difference_change(snapshot, dose, measure, level) for level in range(1, len(levels))]
                welch = [verdicts.unpaired(snapshot, [y, x0], [x, y0], measure) for x, y in others]
                rows += _rows(f"its change from {dose.levels[0]}", [None, *by_seed], [None, *welch], measure)
            yield from table([f"{measure.label}; {dose.axis}", *dose.levels], rows)
        yield from contrasts.of_dose(snapshot, dose)
        yield from shown(snapshot.study, drawn, f"dose_{dose.name}", dose.title)


def _rows(
    name: str, by_seed: Sequence[Difference | None], welch: Sequence[Estimate | None], measure: Measure
) -> Iterator[list[str]]:
    yield [name, *(signed_text(d, measure) for d in by_seed)]
    yield ["the same, unpaired", *(interval_text(d, measure) or "-" for d in welch)]


def compared(snapshot: Snapshot, dose: Dose) -> bool:
    """Whether all lines of a dose have runs at two of its levels or more."""
    return sum(all(map(snapshot.finished, arms)) for arms in zip(*dose.lines.values(), strict=True)) > 1


def difference_change(snapshot: Snapshot, dose: Dose, measure: Measure, level: int) -> Difference | None:
    """Return the second line less the first at a level, less the same at the first level, paired by seed.

    Of a ratio it is of logarithms.

    Seeds without all four runs are left out.
    """
    a, b = dose.lines.values()
    of = math.log if measure.ratio else float
    arms = (a[0], b[0], a[level], b[level])
    a0, b0, a1, b1 = ({seed: of(x) for seed, x in snapshot.values(arm, measure).items()} for arm in arms)
    at_level = {seed: b1[seed] - a1[seed] for seed in a1.keys() & b1.keys()}
    return paired(at_level, {seed: b0[seed] - a0[seed] for seed in a0.keys() & b0.keys()})


def _cell(snapshot: Snapshot, arm: str, measure: Measure) -> str:
    text = estimate_text(mean_of(snapshot, arm, measure), measure, n=True)
    return ", ".join(filter(None, (text, diverged_text(snapshot, arm))))
