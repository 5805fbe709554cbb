"""Verdicts: conclusions about the parts of a claim from differences between arms, by one written rule."""

import dataclasses

from studies.declaration import Claim, ClaimPart
from studies.matrix import Matrix
from studies.statistics import MIN_SEEDS, Difference, Estimate, holm, p_above, paired, unpaired

ALPHA = 0.05
HOLDS = "holds"
FAILS = "fails"
UNDECIDED = "undecided"
UNCORRECTED = "for the claim, uncorrected"
OPPOSED = "against the claim, uncorrected"
RULE = (
    "Differences are paired by seed, with 95 % t-intervals. A part *holds* if the whole interval is on the claimed "
    "side of zero, and all seeds or all but one. It *fails* if the whole interval is on the other side, also after "
    "Holm's correction over the parts of the claim. A claim *holds* if all parts hold, which needs no correction; it "
    f"*fails* if one part fails. Otherwise it is *{UNDECIDED}*, and a part holds only if its p is below {ALPHA:g} "
    f"after Holm's correction. Fewer than {MIN_SEEDS} seeds decide nothing. *p* is of the t-test; the sign-flip test "
    "assumes no distribution, but cannot be below 2 / 2^n: it decides nothing. Nor do intervals *without pairing*, of "
    "one variance for the arms of a part."
)


@dataclasses.dataclass(frozen=True)
class PartVerdict:
    """The verdict on a part."""

    part: ClaimPart
    difference: Difference | None = None  # `plus` - `minus`, of logarithms for a ratio; None without a common seed
    agreeing: int = 0  # number of seeds whose difference has the claimed sign
    p: float = 1.0  # twice the one-sided p that the difference is on the claimed side
    p_against: float = 1.0  # the same for the other side
    p_holm: float = 1.0  # `p` after Holm's correction within the claim
    p_against_holm: float = 1.0  # the same of `p_against`
    verdict: str = UNDECIDED  # or `HOLDS`, `FAILS`, `OPPOSED`, or `UNCORRECTED` in a claim that does not hold


@dataclasses.dataclass(frozen=True)
class ClaimVerdict:
    """A claim with the verdicts on its parts."""

    claim: Claim
    parts: list[PartVerdict]
    verdict: str


def difference(matrix: Matrix, part: ClaimPart) -> Difference | None:
    """Return the sum over `plus` minus the sum over `minus`, paired by seed."""
    sides = []
    for side in (part.plus, part.minus):
        terms = [matrix.values(arm, matrix.study.measure(name)) for arm, name in part.terms(side)]
        seeds = set.intersection(*(set(values) for values in terms))
        sides.append({seed: sum(values[seed] for values in terms) for seed in sorted(seeds)})
    return paired(*sides)


def unpaired_difference(matrix: Matrix, part: ClaimPart) -> Estimate | None:
    """Return the same difference without pairing, with an interval from the variance within the part's arms."""
    plus, minus = (
        [list(matrix.values(arm, matrix.study.measure(name)).values()) for arm, name in part.terms(side)]
        for side in (part.plus, part.minus)
    )
    return unpaired(plus, minus, [*plus, *minus])


def compare(matrix: Matrix, part: ClaimPart) -> PartVerdict:
    """Return the verdict on a single part, without correction."""
    d = difference(matrix, part)
    if d is None:
        return PartVerdict(part)
    side = 1 if matrix.study.measure(part.measure).higher else -1
    agreeing = sum(side * x > 0 for x in d.values)
    p = min(1.0, 2 * p_above(side * d.mean, d.standard_error, d.n))
    against = min(1.0, 2 * p_above(-side * d.mean, d.standard_error, d.n))
    holds = d.n >= MIN_SEEDS and p < ALPHA and agreeing >= d.n - 1
    return PartVerdict(part, d, agreeing, p, against, verdict=HOLDS if holds else UNDECIDED)


def judge(matrix: Matrix, claim: Claim) -> ClaimVerdict:
    """Return the verdict on a claim, by `RULE`."""
    parts = [compare(matrix, part) for part in claim.parts]
    corrected = holm([part.p for part in parts])
    corrected_against = holm([part.p_against for part in parts])
    for i, part in enumerate(parts):
        verdict = part.verdict
        if part.difference is not None and part.difference.n >= MIN_SEEDS and part.p_against < ALPHA:
            verdict = FAILS if corrected_against[i] < ALPHA else OPPOSED
        corrections = {"p_holm": corrected[i], "p_against_holm": corrected_against[i]}
        parts[i] = dataclasses.replace(part, **corrections, verdict=verdict)
    verdicts = [part.verdict for part in parts]
    if all(verdict == HOLDS for verdict in verdicts):
        return ClaimVerdict(claim, parts, HOLDS)
    whole = FAILS if FAILS in verdicts else UNDECIDED
    for i, part in enumerate(parts):
        if part.verdict == HOLDS and part.p_holm >= ALPHA:
            parts[i] = dataclasses.replace(part, verdict=UNCORRECTED)
    return ClaimVerdict(claim, parts, whole)
