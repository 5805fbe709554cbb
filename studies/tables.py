"""The tables of a study's page: numbers as Markdown, and the sections that consist of tables of differences."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from studies import verdicts
from studies.declaration import DoseResponse, Measure, Study
from studies.matrix import Snapshot
from studies.statistics import MIN_SEEDS, Difference, Estimate, estimate, paired


def estimate_text(of_mean: Estimate | None, measure: Measure, *, n: bool = False) -> str:
    """ "12.3 [11.0, 13.6]", with n where it is asked for; of fewer than three runs "12.3 (n = 2)"."""
    if of_mean is None:
        return "-"
    shown, digits = of_mean.mapped(math.exp) if measure.ratio else of_mean, measure.digits
    if shown.n < MIN_SEEDS:
        return f"{shown.mean:.{digits}f} (n = {shown.n})"
    interval = f"[{shown.low:.{digits}f}, {shown.high:.{digits}f}]"
    return f"{shown.mean:.{digits}f} {interval}" + (f", n = {shown.n}" if n else "")


def difference_text(d: Estimate | None, measure: Measure) -> str:
    """ "+1.2 [+0.4, +2.0]"; of a ratio "x 1.10 [1.02, 1.19]"; of fewer than three seeds "+1.2 (n = 2)"."""
    if d is None:
        return "-"
    mean = f"x {math.exp(d.mean):.2f}" if measure.ratio else f"{d.mean:+.{measure.digits}f}"
    return f"{mean} {interval_text(d, measure) or f'(n = {d.n})'}"


def interval_text(d: Estimate | None, measure: Measure) -> str:
    """ "[+0.4, +2.0]" of a difference; "" of fewer than three seeds."""
    if d is None or d.n < MIN_SEEDS:
        return ""
    if measure.ratio:
        return f"[{math.exp(d.low):.2f}, {math.exp(d.high):.2f}]"
    return f"[{d.low:+.{measure.digits}f}, {d.high:+.{measure.digits}f}]"


def signed_text(d: Difference | None, measure: Measure) -> str:
    """ "+1.2 [+0.4, +2.0], 4/5": a difference, and how many of its seeds are above zero."""
    return difference_text(d, measure) + (f", {d.positive}/{d.n}" if d else "")


def p_text(value: float) -> str:
    """A p-value with four digits."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines), ""]


def mean_of(snapshot: Snapshot, arm: str, measure: Measure) -> Estimate | None:
    """The mean of an arm over seeds, of the logarithm where the measure is a ratio; None without runs."""
    values = list(snapshot.values(arm, measure).values())
    if measure.ratio:
        values = [math.log(value) for value in values if value > 0]
    return estimate(values) if values else None


def runs_text(snapshot: Snapshot, arm: str) -> str:
    """ "5", "3 of 5", "5, 1 diverged"."""
    records, planned = snapshot.finished(arm), len(snapshot.study.arm(arm).seeds)
    count = str(planned) if len(records) == planned else f"{len(records)} of {planned}"
    return ", ".join(filter(None, (count, diverged_text(snapshot, arm))))


def diverged_text(snapshot: Snapshot, arm: str) -> str:
    """ "1 diverged", or "" """
    diverged = sum(bool(record.error) for record in snapshot.finished(arm).values())
    return f"{diverged} diverged" if diverged else ""


def rows_of(
    snapshot: Snapshot, arms: Mapping[str, str], measures: Sequence[Measure], *, each: bool = False
) -> list[list[str]]:
    """A row for each {title: arm}: finished runs, and each measure.

    Args:
      snapshot, arms, measures: what is shown.
      each: show both values of two runs with their mean, since an interval of two says little.
    """

    def cell(arm: str, measure: Measure) -> str:
        values = snapshot.values(arm, measure).values()
        text = estimate_text(mean_of(snapshot, arm, measure), measure)
        if not each or len(values) != 2:
            return text
        return f"{text.partition(' (')[0]} ({', '.join(f'{value:.{measure.digits}f}' for value in values)})"

    return [
        [title, runs_text(snapshot, arm), *(cell(arm, measure) for measure in measures)] for title, arm in arms.items()
    ]


def shown(drawn: Mapping[str, str], name: str, title: str) -> list[str]:
    """Lines of a chart, none where it was not drawn; `drawn` has the paths of charts by name."""
    return [f"![{title}]({drawn[name]})", ""] if name in drawn else []


def titles_of(snapshot: Snapshot, section: str) -> dict[str, str]:
    """{title: arm} of a section."""
    return {arm.title: arm.name for arm in snapshot.study.of_section(section)}


# --- differences from controls, of tuned settings and of secondary measures


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
    yield from controls_bybest_similarity(snapshot)


def tuned(snapshot: Snapshot) -> Iterator[str]:
    """Yield what the settings that the factors chose are worth."""
    study = snapshot.study
    if not study.tuned_comparisons:
        return
    yield from ["## The setting tuned on validation", ""]
    yield from _scores(snapshot, [a for a, _, _ in study.tuned_comparisons], study.measures)
    yield from _differences(snapshot, study.tuned_comparisons)
    if study.tuned_controls:
        yield from ["Against controls:", "", *_differences(snapshot, study.tuned_controls)]
        yield from _survivors(snapshot, study.tuned_controls)


def secondary(snapshot: Snapshot) -> Iterator[str]:
    """Yield the measures that have no part in a verdict, for the arms of the core and those with tuned settings."""
    study = snapshot.study
    if not study.secondary:
        return
    yield from ["## More measures", "", "Other numbers of the same tests, without a verdict.", ""]
    names = [*(arm.name for arm in study.of_section("core")), *dict.fromkeys(a for a, _, _ in study.tuned_comparisons)]
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
    rows = [[study.arm(name).title, *_differences_of(snapshot, name, baseline, measures)] for name in others]
    return table(["arm", *(measure.label for measure in measures)], rows)


def _scores(snapshot: Snapshot, names: Sequence[str], measures: Sequence[Measure]) -> list[str]:
    """Finished runs and means of these arms, each once."""
    arms = {snapshot.study.arm(name).title: name for name in names}
    return table([*_RUN_COLUMNS, *(measure.label for measure in measures)], rows_of(snapshot, arms, measures))


def _differences_of(snapshot: Snapshot, a: str | None, b: str | None, measures: Sequence[Measure]) -> list[str]:
    pairs = [verdicts.difference(snapshot, a, b, m) if a and b else None for m in measures]
    return [signed_text(d, m) for d, m in zip(pairs, measures, strict=True)]


def _differences(
    snapshot: Snapshot,
    contrasts: Sequence[verdicts.Contrast],
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
        cells = _differences_of(snapshot, left, right, measures)
        if unpaired and left and right:
            welch = (interval_text(verdicts.unpaired(snapshot, [left], [right], m), m) for m in measures)
            cells = [f"{cell}; unpaired {text}" if text else cell for cell, text in zip(cells, welch, strict=True)]
        rows.append([f"{names[0]} − {names[1]}", meaning, *cells])
    return table(["difference", "what it shows", *(measure.label for measure in measures)], rows)


def _survivors(snapshot: Snapshot, contrasts: Sequence[verdicts.Contrast]) -> Iterator[str]:
    """For each measure the controls over which xCLIP gains, by p after Holm's correction over the controls."""
    study = snapshot.study
    floor = f"; {study.arm(study.floor).title} is left out" if study.floor in [b for _, b, _ in contrasts] else ""
    yield (
        "The intervals are not corrected for their number. Gains with p below 0.05 by the paired t-test after Holm's "
        f"correction over the controls of a measure ({MIN_SEEDS} seeds or more{floor}):"
    )
    yield ""
    nothing, compared = [], False
    for measure in study.measures:
        shown = verdicts.gains(snapshot, contrasts, measure)
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


# --- doses


_DOSES = (
    "Differences and their changes are paired by seed. With fewer than five seeds a paired interval can be narrow by "
    "chance: below each stands Welch's, which takes runs as independent."
)


def doses(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    """Yield each dose's tables, with the change of the difference from the first level, and its chart."""
    if not snapshot.study.doses:
        return
    yield from ["## Dose and response", "", _DOSES, ""]
    for dose in snapshot.study.doses:
        yield from [f"### {dose.title}", ""]
        if not compared(snapshot, dose):
            yield from ["Nothing to compare yet: see [what is missing](#missing-runs).", ""]
            continue
        for measure in map(snapshot.study.measure, dose.measures):
            rows = [[name, *(_dose_cell(snapshot, arm, measure) for arm in arms)] for name, arms in dose.lines.items()]
            if len(dose.lines) == 2:
                (first, a), (second, b) = dose.lines.items()
                name, levels = f"{second} − {first}", list(zip(a, b, strict=True))
                by_seed = [verdicts.difference(snapshot, y, x, measure) for x, y in levels]
                welch = [verdicts.unpaired(snapshot, [y], [x], measure) for x, y in levels]
                rows += _difference_rows(name, by_seed, welch, measure)
                (x0, y0), *others = levels
                by_seed = [difference_change(snapshot, dose, measure, level) for level in range(1, len(levels))]
                welch = [verdicts.unpaired(snapshot, [y, x0], [x, y0], measure) for x, y in others]
                rows += _difference_rows(f"its change from {dose.levels[0]}", [None, *by_seed], [None, *welch], measure)
            yield from table([f"{measure.label}; {dose.axis}", *dose.levels], rows)
        if dose.controls:
            measures = [snapshot.study.measure(name) for name in dose.measures]
            yield from ["Against controls:", "", *_differences(snapshot, dose.controls, measures, unpaired=True)]
        yield from shown(drawn, f"dose_{dose.name}", dose.title)


def _difference_rows(
    name: str, by_seed: Sequence[Difference | None], welch: Sequence[Estimate | None], measure: Measure
) -> Iterator[list[str]]:
    yield [name, *(signed_text(d, measure) for d in by_seed)]
    yield ["the same, unpaired", *(interval_text(d, measure) or "-" for d in welch)]


def compared(snapshot: Snapshot, dose: DoseResponse) -> bool:
    """Whether all lines of a dose have runs at two of its levels or more."""
    return sum(all(map(snapshot.finished, arms)) for arms in zip(*dose.lines.values(), strict=True)) > 1


def difference_change(snapshot: Snapshot, dose: DoseResponse, measure: Measure, level: int) -> Difference | None:
    """Return the second line less the first at a level, less the same at the first level, paired by seed.

    Differences of ratios are differences of logarithms. Seeds without all four runs are left out.
    """
    a, b = dose.lines.values()
    of = math.log if measure.ratio else float
    arms = (a[0], b[0], a[level], b[level])
    a0, b0, a1, b1 = ({seed: of(x) for seed, x in snapshot.values(arm, measure).items()} for arm in arms)
    at_level = {seed: b1[seed] - a1[seed] for seed in a1.keys() & b1.keys()}
    return paired(at_level, {seed: b0[seed] - a0[seed] for seed in a0.keys() & b0.keys()})


def _dose_cell(snapshot: Snapshot, arm: str, measure: Measure) -> str:
    text = estimate_text(mean_of(snapshot, arm, measure), measure, n=True)
    return ", ".join(filter(None, (text, diverged_text(snapshot, arm))))


# --- similarities


_LABELS = {"": "its own", "cosine": "clusters by cosine", "cross_entropy": "clusters by cross-entropy"}
_SIMILARITIES = (
    "A model with clusters can classify by these, and where it has a projection too by both: the cosine of embeddings "
    "and the negative cross-entropy of clusters, each divided by its standard deviation. What is compared above is "
    "a model's own similarity: the cosine of embeddings, or of distributions over clusters where there is no "
    "projection. Here each arm classifies by the similarity that is best on validation, by the mean over its seeds."
)


def similarities(snapshot: Snapshot) -> Iterator[str]:
    """Yield a table for each validation set of `Study.named`: all similarities there, and the best one on the tests."""
    study = snapshot.study
    tuned_arms = [study.arm(name) for name in dict.fromkeys(a for a, _, _ in study.tuned_comparisons)]
    arms = [arm for arm in (*study.of_section("core"), *tuned_arms) if snapshot.finished(arm.name)]
    names = {arm.name: _similarities(snapshot, arm.name) for arm in arms}
    if not any(len(of_set) > 1 for keys in names.values() for of_set in keys.values()):
        return
    yield from ["## Which similarity classifies best", "", _SIMILARITIES, ""]
    for validation, test in study.named.items():
        measure, rows, best = study.measure(test), [], {}
        scores = list(dict.fromkeys(score for keys in names.values() for score in keys[validation]))
        for arm in arms:
            keys = names[arm.name][validation]
            on = {score: dataclasses.replace(measure, set=validation, metric=key) for score, key in keys.items()}
            means = {score: mean_of(snapshot, arm.name, m) for score, m in on.items()}
            cells = [estimate_text(means[score], measure) if score in means else "-" for score in scores]
            chosen, of_tests = best_similarity(snapshot, arm.name, validation, test)
            best |= {arm.name: of_tests} if of_tests else {}
            rows.append(
                [arm.title, *cells, _label(chosen) if of_tests else "-", *_cells_of_tests(snapshot, arm.name, best)]
            )
        head = ["arm", *(f"{_label(score)}, validation" for score in scores), "chosen", measure.label]
        yield from [
            f"### By `{validation}`",
            "",
            *table([*head, f"difference from {study.arm(study.baseline).title}"], rows),
        ]


def controls_bybest_similarity(snapshot: Snapshot) -> Iterator[str]:
    """Yield the differences from controls where each arm classifies by the similarity that is best on validation."""
    study, rows = snapshot.study, []
    for a, b, _ in study.controls:
        left, right = snapshot.choice(a), snapshot.choice(b)
        if not left or not snapshot.finished(left) or not right or not snapshot.finished(right):
            continue
        cells = [f"{study.arm(left).title} − {study.arm(right).title}"]
        for validation, test in study.named.items():
            sides = [best_similarity(snapshot, arm, validation, test) for arm in (left, right)]
            values = [snapshot.values(arm, m) for arm, (_, m) in zip((left, right), sides, strict=True) if m]
            d = paired(*values) if len(values) == 2 else None
            first, second = (_label(score) for score, _ in sides)
            by = first if first == second else f"{first}, the second by {second}"
            cells.append(f"{signed_text(d, study.measure(test))}; by {by}" if d else "-")
        rows.append(cells)
    if rows:
        yield from ["The same where each classifies by the similarity that is best for it on validation:", ""]
        yield from table(["difference", *(study.measure(test).label for test in study.named.values())], rows)


def best_similarity(snapshot: Snapshot, arm: str, validation: str, test: str) -> tuple[str, Measure | None]:
    """The similarity of an arm that is best on a validation set, and the measure of the tests by it."""
    if not snapshot.finished(arm):
        return "", None
    measure, keys = snapshot.study.measure(test), _similarities(snapshot, arm)[validation]
    means = {
        score: mean
        for score, key in keys.items()
        if (mean := mean_of(snapshot, arm, dataclasses.replace(measure, set=validation, metric=key)))
    }
    score = max(means, key=lambda score: means[score].mean, default=None)
    return ("", None) if score is None else (score, dataclasses.replace(measure, metric=keys[score]))


def _similarities(snapshot: Snapshot, arm: str) -> dict[str, dict[str, str]]:
    """{validation set: {similarity: key of the set's headline by it}}, of one run: all runs of an arm have the same."""
    finished = list(snapshot.finished(arm).values())
    record = next((record for record in finished if record.results), finished[0])  # a run that diverged has none
    return {validation: record.similarities(validation) for validation in snapshot.study.named}


def _cells_of_tests(snapshot: Snapshot, arm: str, best: dict[str, Measure]) -> tuple[str, str]:
    """The mean of an arm by its best similarity, and its difference from the baseline by the baseline's."""
    if arm not in best:
        return "-", "-"
    measure, baseline = best[arm], snapshot.study.baseline
    mean = estimate_text(mean_of(snapshot, arm, measure), measure)
    if arm == baseline or baseline not in best:
        return mean, "-"
    d = paired(snapshot.values(arm, measure), snapshot.values(baseline, best[baseline]))
    return mean, signed_text(d, measure)


def _label(score: str) -> str:
    return _LABELS.get(score, score.replace("_", " "))
