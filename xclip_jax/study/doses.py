"""The part of a study's page on doses: what becomes of the arms' difference as one thing changes."""

import math
from collections.abc import Iterator, Mapping

from xclip_jax.study import contrasts, verdicts
from xclip_jax.study.declaration import Dose, Measure
from xclip_jax.study.markdown import diverged_text, estimate_text, mean_of, shown, signed_text, table
from xclip_jax.study.matrix import Snapshot
from xclip_jax.study.statistics import MIN_SEEDS, Difference, paired


def section(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    """Yield for each dose its tables, how the difference changes from the first level to the last, and its chart."""
    if not snapshot.study.doses:
        return
    yield from ["## Dose and response", ""]
    for dose in snapshot.study.doses:
        yield from [f"### {dose.title}", ""]
        if not compared(snapshot, dose):
            yield from ["Nothing to compare yet: see [what is missing](#missing-runs).", ""]
            continue
        changes = []
        for measure in map(snapshot.study.measure, dose.measures):
            rows = [[name, *(_cell(snapshot, arm, measure) for arm in arms)] for name, arms in dose.lines.items()]
            if len(dose.lines) == 2:
                (first, a), (second, b) = dose.lines.items()
                pairs = (verdicts.difference(snapshot, *pair, measure) for pair in zip(b, a, strict=True))
                rows.append([f"{second} − {first}", *(signed_text(d, measure) for d in pairs)])
                change = interaction(snapshot, dose, measure)
                if change and change.n >= MIN_SEEDS:
                    changes.append(f"{measure.label} {signed_text(change, measure)} seeds above zero")
            yield from table([f"{measure.label}; {dose.axis}", *dose.levels], rows)
        if changes:
            ends = f"From {dose.levels[0]} to {dose.levels[-1]} ({dose.axis})"
            yield from [f"{ends} the difference changes by: {'; '.join(changes)}.", ""]
        yield from contrasts.of_dose(snapshot, dose)
        yield from shown(snapshot.study, drawn, f"dose_{dose.name}", dose.title)


def compared(snapshot: Snapshot, dose: Dose) -> bool:
    """Whether all lines of a dose have runs at two of its levels or more."""
    return sum(all(map(snapshot.finished, arms)) for arms in zip(*dose.lines.values(), strict=True)) > 1


def interaction(snapshot: Snapshot, dose: Dose, measure: Measure) -> Difference | None:
    """Return the second line less the first at the last level, less the same at the first, paired by seed.

    Of a ratio it is of logarithms.

    Seeds without all four runs are left out.
    """
    a, b = dose.lines.values()
    of = math.log if measure.ratio else float
    ends = [{seed: of(x) for seed, x in snapshot.values(arm, measure).items()} for arm in (a[0], b[0], a[-1], b[-1])]
    (a0, b0, a1, b1) = ends
    last = {seed: b1[seed] - a1[seed] for seed in a1.keys() & b1.keys()}
    return paired(last, {seed: b0[seed] - a0[seed] for seed in a0.keys() & b0.keys()})


def _cell(snapshot: Snapshot, arm: str, measure: Measure) -> str:
    text = estimate_text(mean_of(snapshot, arm, measure), measure, n=True)
    return ", ".join(filter(None, (text, diverged_text(snapshot, arm))))
