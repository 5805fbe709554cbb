"""The part of a study's page that says by which of its similarities a model classifies best."""

import dataclasses
from collections.abc import Iterator

from studies.declaration import Measure
from studies.markdown import estimate_text, mean_of, signed_text, table
from studies.matrix import Snapshot
from studies.statistics import paired

_LABELS = {"": "its own", "cosine": "clusters by cosine", "cross_entropy": "clusters by cross-entropy"}
_TEXT = (
    "A model with clusters can classify by these, and where it has a projection too by both: the cosine of embeddings "
    "and the negative cross-entropy of clusters, each divided by its standard deviation. What is compared above is "
    "a model's own similarity: the cosine of embeddings, or of distributions over clusters where there is no "
    "projection. Here each arm classifies by the similarity that is best on validation, by the mean over its seeds."
)


def section(snapshot: Snapshot) -> Iterator[str]:
    """Yield a table for each validation set of `Study.named`: all similarities there, and the best one on the tests."""
    study = snapshot.study
    sought = [study.arm(name) for name in dict.fromkeys(a for a, _, _ in study.sought)]
    arms = [arm for arm in (*study.of_section("core"), *sought) if snapshot.finished(arm.name)]
    names = {arm.name: _similarities(snapshot, arm.name) for arm in arms}
    if not any(len(of_set) > 1 for keys in names.values() for of_set in keys.values()):
        return
    yield from ["## Which similarity classifies best", "", _TEXT, ""]
    for validation, test in study.named.items():
        measure, rows, best = study.measure(test), [], {}
        scores = list(dict.fromkeys(score for keys in names.values() for score in keys[validation]))
        for arm in arms:
            keys = names[arm.name][validation]
            on = {score: dataclasses.replace(measure, set=validation, metric=key) for score, key in keys.items()}
            means = {score: mean_of(snapshot, arm.name, m) for score, m in on.items()}
            cells = [estimate_text(means[score], measure) if score in means else "-" for score in scores]
            chosen, of_tests = _best(snapshot, arm.name, validation, test)
            best |= {arm.name: of_tests} if of_tests else {}
            rows.append([arm.title, *cells, _label(chosen) if of_tests else "-", *_tests(snapshot, arm.name, best)])
        head = ["arm", *(f"{_label(score)}, validation" for score in scores), "chosen", measure.label]
        yield from [
            f"### By `{validation}`",
            "",
            *table([*head, f"difference from {study.arm(study.baseline).title}"], rows),
        ]


def controls(snapshot: Snapshot) -> Iterator[str]:
    """Yield the differences from controls where each classifies by the similarity that is best on validation."""
    study, rows = snapshot.study, []
    for a, b, _ in study.controls:
        left, right = snapshot.choice(a), snapshot.choice(b)
        if not left or not snapshot.finished(left) or not right or not snapshot.finished(right):
            continue
        cells = [f"{study.arm(left).title} − {study.arm(right).title}"]
        for validation, test in study.named.items():
            sides = [_best(snapshot, arm, validation, test) for arm in (left, right)]
            values = [snapshot.values(arm, m) for arm, (_, m) in zip((left, right), sides, strict=True) if m]
            d = paired(*values) if len(values) == 2 else None
            first, second = (_label(score) for score, _ in sides)
            by = first if first == second else f"{first}, the second by {second}"
            cells.append(f"{signed_text(d, study.measure(test))}; by {by}" if d else "-")
        rows.append(cells)
    if rows:
        yield from ["The same where each classifies by the similarity that is best for it on validation:", ""]
        yield from table(["difference", *(study.measure(test).label for test in study.named.values())], rows)


def _best(snapshot: Snapshot, arm: str, validation: str, test: str) -> tuple[str, Measure | None]:
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


def _tests(snapshot: Snapshot, arm: str, best: dict[str, Measure]) -> tuple[str, str]:
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
