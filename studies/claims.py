"""The conclusions of a study's page: verdicts with their tables, how a choice was made, and what is missing."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from studies import verdicts
from studies.declaration import Claim, ExtraComparisons
from studies.matrix import Run, Snapshot, selected
from studies.statistics import FEW_SEEDS, MIN_SEEDS
from studies.tables import difference_text, diverged_text, p_text, shown, table

FINDINGS = 3  # the first claims of a study, which are the paper's
_OPEN = "not chosen yet"
_OPEN_CLAIM = "undecided at this scale"
_NOTHING = "Nothing to compare yet"
_SHOWN = {
    verdicts.HOLDS: "Shown",
    verdicts.FAILS: "Refuted",
    verdicts.UNCORRECTED: verdicts.UNCORRECTED.capitalize(),
    verdicts.OPPOSED: verdicts.OPPOSED.capitalize(),
    verdicts.UNDECIDED: "Undecided",
}


def counts(snapshot: Snapshot) -> tuple[int, int]:
    """Return how many runs are finished and how many are missing; one that arms share counts once."""
    runs = selected(snapshot, ())
    missing = len(_missing(snapshot, runs))
    return len(runs) - missing, missing


def progress(snapshot: Snapshot) -> str:
    """Return how many runs are finished, in a sentence."""
    done, missing = counts(snapshot)
    if not done:
        return f"**No run has been made yet**: this page declares the study and its {missing} runs."
    shared = "Arms of one config share their runs, which are counted once."
    if missing:
        more = "What is missing is listed below; each n is that of the files."
        return f"**{done} runs are finished, {missing} are missing.** {shared} {more}"
    return f"All {done} runs are finished. {shared}"


def interim(snapshot: Snapshot) -> str:
    """Return "Interim: 3 of 5 seeds" while runs of the core are missing, else ""."""
    arms = snapshot.study.of_section("core")
    planned = set().union(*(arm.seeds for arm in arms))
    common = set.intersection(*(set(snapshot.finished(arm.name)) for arm in arms)) if arms else planned
    return "" if common == planned else f"Interim: {len(common)} of {len(planned)} seeds"


def findings(snapshot: Snapshot) -> list[str]:
    """Return the lines of a README: the study's scope, a sentence on the first claims, and the extra comparisons.

    Further claims that hold or fail have a sentence too.
    """
    study = snapshot.study
    judged = [verdicts.judge(snapshot, claim) for claim in study.claims]
    done, missing = counts(snapshot)
    left = f"{missing} of {done + missing} runs are missing" if missing else ""
    scope = "; ".join(filter(None, (interim(snapshot), study.scope, left)))
    others = [sentence(claim) for claim in judged[FINDINGS:] if claim.verdict != verdicts.UNDECIDED]
    lines = [*([f"*{scope}.*", ""] if scope else []), " ".join([_counts(judged[:FINDINGS]), *others])]
    if study.extra_comparisons:
        rows = next(iter(_columns(snapshot, study.extra_comparisons).values()))
        lines += ["", study.extra_comparisons.sentence.format(*rows)]
    return lines


def extra_comparisons(snapshot: Snapshot) -> list[str]:
    """Return the table of the extra comparisons and an empty line, or nothing where the study declares none."""
    if not (declared := snapshot.study.extra_comparisons):
        return []
    columns = _columns(snapshot, declared)
    rows = [list(row) for row in itertools.zip_longest(declared.rows, *columns.values(), fillvalue="-")]
    labels = " / ".join(snapshot.study.measure(name).label for name in declared.measures)
    return [f"{declared.text}: {labels}.", "", *table(["difference from", *columns], rows)]


def _columns(snapshot: Snapshot, declared: ExtraComparisons) -> dict[str, list[str]]:
    """Return {name of a column, with its seeds: its cells}."""
    columns = {}
    measures = [snapshot.study.measure(name) for name in declared.measures]
    for name, pairs in declared.columns.items():
        by_seed = [[verdicts.difference(snapshot, *pair, measure) for measure in measures] for pair in pairs]
        n = max((d.n for cell in by_seed for d in cell if d), default=0)
        welch = [[verdicts.unpaired(snapshot, [a], [b], measure) for measure in measures] for a, b in pairs]
        head = f"{name} ({n} seeds{', unpaired' if MIN_SEEDS <= n < FEW_SEEDS else ''})"
        shown_here = welch if n < FEW_SEEDS else by_seed
        columns[head] = [" / ".join(map(difference_text, cell, measures)) for cell in shown_here]
    return columns


def summary(snapshot: Snapshot, drawn: Mapping[str, str]) -> Iterator[str]:
    """Yield the verdicts in a sentence each, what is missing of them, and `Study.extra_comparisons`."""
    study = snapshot.study
    yield from ["## Verdicts", "", *shown(drawn, "finding", "Differences from the baseline")]
    if text := interim(snapshot):
        yield from [f"**{text}** of the core have all of their runs.", ""]
    done, planned = _controls(snapshot)
    if done < planned:
        text = "what else could explain a difference is open as far as these would say it."
        yield from [f"**{planned - done} of {planned} runs of controls are missing**: {text}", ""]
    for number, claim in enumerate(study.claims, 1):
        yield from [f"{number}. {sentence(verdicts.judge(snapshot, claim))}", ""]
    yield from extra_comparisons(snapshot)


def section(snapshot: Snapshot) -> Iterator[str]:
    """Yield a table for each claim, the rule, and how choices were made."""
    study = snapshot.study
    yield from ["## Verdicts, part by part", ""]
    for number, claim in enumerate(study.claims, 1):
        judged = verdicts.judge(snapshot, claim)
        yield from [f"### Claim {number}", "", *parts_table(snapshot, judged)]
        if claim.all_choices:
            yield from _others(snapshot, claim)
        if claim.tuned_on_seeds:
            yield from _unseen(snapshot, claim)
    rule = (*verdicts.RULE, *study.changed)
    yield from ["### The rule", "", *(line for text in rule for line in (text, ""))]
    for name in study.choices:
        yield from _choice(snapshot, name)


def _controls(snapshot: Snapshot) -> tuple[int, int]:
    """How many runs of controls are finished, and how many are planned."""
    study = snapshot.study
    names = (*(b for _, b, _ in (*study.controls, *study.tuned_controls)), *study.common.values())
    runs = selected(snapshot, names) if names else []
    return len(runs) - len(_missing(snapshot, runs)), len(runs)


def _missing(snapshot: Snapshot, runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.key not in snapshot.records]


def sentence(claim: verdicts.ClaimVerdict) -> str:
    """The sentence on a claim: its words, its verdict and what its parts show, by verdict where these differ."""
    if not any(part.difference for part in claim.parts):
        return f"*{claim.claim.text}* **{_NOTHING}.**"
    groups, labels = {}, [part.measure.label for part in claim.parts]
    for verdict, word in _SHOWN.items():
        # "Against the claim: xCLIP gains at retrieval" would read as if it did; one measure may be of several parts.
        named = [verdict == verdicts.OPPOSED and labels.count(label) == 1 for label in labels]
        parts = zip(claim.parts, named, strict=True)
        texts = [_numbers(part, name=name) for part, name in parts if part.verdict == verdict]
        groups |= {word: "; ".join(texts)} if texts else {}
    verdict = (_OPEN_CLAIM if claim.verdict == verdicts.UNDECIDED else claim.verdict).capitalize()
    if {part.verdict for part in claim.parts} == {claim.verdict}:
        return f"*{claim.claim.text}* **{verdict}**: {next(iter(groups.values()))}."
    details = ". ".join(f"{word}: {texts}" for word, texts in groups.items())
    return f"*{claim.claim.text}* **{verdict}.** {details}."


def _counts(claims: Sequence[verdicts.ClaimVerdict]) -> str:
    """A sentence on several claims: how many hold, fail or stay undecided, and the parts that are decided."""
    verbs = {
        verdicts.HOLDS: ("holds", "hold"),
        verdicts.FAILS: ("fails", "fail"),
        verdicts.UNDECIDED: (f"is {_OPEN_CLAIM}", f"are {_OPEN_CLAIM}"),
    }
    groups = []
    for verdict, verb in verbs.items():
        if texts := [claim.claim.short or claim.claim.text.rstrip(".") for claim in claims if claim.verdict == verdict]:
            groups.append(f"{len(texts)} {verb[len(texts) > 1]}** (*{'; '.join(texts)}*)")
    texts = [f"**Of the paper's {len(claims)} claims, {', **'.join(groups)}"]
    for verdict in (verdicts.HOLDS, verdicts.FAILS):
        parts = [_numbers(part) for claim in claims for part in claim.parts if part.verdict == verdict]
        texts += [f"{_SHOWN[verdict].lower()}: {', '.join(parts)}"] if parts else []
    return f"{'; '.join(texts)}."


def _numbers(part: verdicts.PartVerdict, *, name: bool = False) -> str:
    """What a part says, or with `name` its measure, with its difference and the seeds on the claimed side."""
    d, text = part.difference, part.measure.label if name else part.part.text
    if d is None:
        return f"{text} (no runs)"
    above = part.part.better == part.measure.higher
    bound = f"{'above -' if above else 'below '}{part.part.margin:g}" if part.part.margin else ""
    return f"{text} ({difference_text(d, part.measure)}, {part.agreeing} of {d.n} seeds {bound or 'agree'})"


def _cells(snapshot: Snapshot, part: verdicts.PartVerdict) -> list[str]:
    """Part, arms, measure, difference, n, seeds that agree, and p of the part by itself."""
    titles = [snapshot.study.arm(name).title if name else _OPEN for name in (part.a, part.b)]
    margin = f", margin {part.part.margin:g}" if part.part.margin else ""
    d = part.difference
    numbers = ["-"] * 3 if d is None else [str(d.n), f"{part.agreeing} of {d.n}", p_text(part.p)]
    names = [part.part.text + margin, f"{titles[0]} − {titles[1]}", part.measure.label]
    return [*names, difference_text(d, part.measure), *numbers]


_HEAD = ("part", "arms", "measure", "difference, 95 %", "n", "seeds that agree", "p for")


def parts_table(snapshot: Snapshot, claim: verdicts.ClaimVerdict) -> list[str]:
    """Return the table of a claim's parts: differences, seeds that agree, p-values and verdicts."""
    rows = []
    for part in claim.parts:
        d = part.difference
        p = ["-"] * 3 if d is None else [p_text(value) for value in (part.p_holm, part.p_against, d.p_flip)]
        rows.append([*_cells(snapshot, part), *p, part.verdict])
    return table([*_HEAD, "p for, Holm", "p against, Holm", "p (sign flip)", "verdict"], rows)


def _others(snapshot: Snapshot, claim: Claim) -> Iterator[str]:
    """The parts of a claim for the arms that were not chosen."""
    rows = []
    for name, arms in snapshot.study.choices.items():
        chosen = snapshot.choice(name)
        for arm in (arm for arm in arms if arm != chosen):
            for part in (part for part in claim.parts if name in (part.a, part.b)):
                a, b = (arm if side == name else snapshot.choice(side) for side in (part.a, part.b))
                rows.append(_cells(snapshot, verdicts.compare(snapshot, part, a, b)))
    if rows:
        yield from ["The same of the arms that were not chosen, without a verdict:", "", *table(_HEAD, rows)]


def _unseen(snapshot: Snapshot, claim: Claim) -> Iterator[str]:
    """The parts of a claim over the seeds that had no part in the search for its setting."""
    rows = []
    for part in claim.parts:
        a, b = snapshot.choice(part.a), snapshot.choice(part.b)
        rows.append(_cells(snapshot, verdicts.compare(snapshot, part, a, b, without=claim.tuned_on_seeds)))
    seeds = ", ".join(map(str, claim.tuned_on_seeds))
    yield from [f"The same without the seeds {seeds}, with which nCLIP's setting was tuned, without a verdict:", ""]
    yield from table(_HEAD, rows)


def _choice(snapshot: Snapshot, name: str) -> Iterator[str]:
    """The choice between arms by seed, and with each seed left out."""
    study, measure = snapshot.study, snapshot.study.choose
    arms, chosen = study.choices[name], snapshot.choice(name)
    seeds = snapshot.seeds(arms, measure)
    rows = []
    for arm in arms:
        values = [snapshot.values(arm, measure)[seed] for seed in seeds]
        mean = f"{sum(values) / len(values):.2f}" if values else "-"
        mark = (
            " **chosen**" if arm == chosen else f" ({diverged})" if (diverged := diverged_text(snapshot, arm)) else ""
        )
        rows.append([study.arm(arm).title + mark, mean, *(f"{value:.2f}" for value in values)])
    better = "higher" if measure.higher else "lower"
    yield from [f"### Which arm is `{name}`", ""]
    yield f"The one whose arithmetic mean of {measure.label} is best over the seeds that all have; {better} is better."
    yield ""
    yield from table(["arm", "mean", *(f"seed {seed}" for seed in seeds)], rows)
    if len(seeds) > 1:
        others = [arm for seed in seeds if (arm := snapshot.choice(name, without=seed)) and arm != chosen]
        titles = ", ".join(dict.fromkeys(study.arm(arm).title for arm in others))
        which = f", {titles}," if titles else ""
        yield from [f"With one seed left out, another{which} is chosen in {len(others)} of {len(seeds)} cases.", ""]
