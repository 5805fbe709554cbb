"""Verdicts: what the differences between arms say about the parts of a claim, by one written rule."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from studies.declaration import Claim, ClaimPart, Measure
from studies.matrix import Snapshot
from studies.statistics import MIN_SEEDS, Difference, Estimate, holm, p_above, paired, welch

ALPHA = 0.05
Contrast = tuple[str, str, str]  # arm or choice, what is subtracted, what the difference shows
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
UNCORRECTED = "for the claim, uncorrected"
OPPOSED = "against the claim, uncorrected"
RULE = (
    'The claimed side of a part is above zero or below, as the part says; of an "at least as good" it begins at minus '
    "the margin. A part is on it if the whole 95 % interval of the paired difference is, and all seeds or all but one: "
    "seeds that agree are counted from minus the margin too. A part *fails* if the whole interval is on the other side "
    "of that bound (with a margin: below minus the margin, not merely below zero) and stays so after Holm's correction "
    f"over the parts of the claim; if that alone is missing it is *{OPPOSED}*. Else, and with fewer than three seeds, "
    "it is *undecided*. How many seeds agree counts for *holds* alone.",
    "A claim *holds* if all of its parts are on the claimed side: that needs no correction, since each must be shown "
    "(an intersection-union test), and each part then holds. It *fails* if one part fails: that is what Holm's "
    "correction is for, since one false alarm among several would do. Else it is *undecided at this scale*; of such a "
    "claim, and of one that fails, a part *holds*, and is called shown, only if p for it is below 0.05 after Holm's "
    f"correction over the parts of the claim; it is else *{UNCORRECTED}*. Nothing is corrected for the number of "
    "claims.",
    "Intervals are Student's t over seeds, and all p but the last are of the paired t-test. *p for*: that the "
    "difference is not on the claimed side, margin included; twice the one-sided p, so that it is below 0.05 where the "
    "interval is on that side. It decides whether a part is on the claimed side; *p for, Holm* whether a part of a "
    "claim that does not hold is shown. *p against, Holm*: the same of the other side of the bound, after Holm's "
    "correction; it decides what fails. *p (sign flip)*: two-sided, that differences are symmetric around zero, "
    "without the margin; it is exact and assumes no distribution, but cannot be below 2 / 2^n (0.0625 for five seeds): "
    "it is reported and decides nothing.",
    "A seed with a run that diverged has no difference, which favours the arm that diverged: tables name such runs, "
    "and an arm with one is neither chosen nor a recipe.",
)


@dataclasses.dataclass(frozen=True)
class PartVerdict:
    """What is known of a part.

    Attributes:
      part, measure: which.
      a, b: the arms that were compared; "" for a choice that is still open.
      difference: a - b, of logarithms where the measure is a ratio; None without a common seed.
      agreeing: seeds whose difference has the claimed sign, margin included.
      p: that the difference is not on the claimed side, margin included: twice the one-sided p of the t-test.
      p_holm: the same after Holm's correction within the claim.
      p_against: that it is not beyond the margin on the other side, after Holm's correction within the claim.
      verdict: one of `HOLDS`, `FAILS`, `OPPOSED`, `UNDECIDED`; `UNCORRECTED` in a claim that does not hold.
    """

    part: ClaimPart
    measure: Measure
    a: str
    b: str
    difference: Difference | None
    agreeing: int
    p: float
    p_holm: float
    p_against: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class ClaimVerdict:
    """A claim with the verdicts on its parts."""

    claim: Claim
    parts: list[PartVerdict]
    verdict: str


def difference(
    snapshot: Snapshot, a: str, b: str, measure: Measure, *, without: Collection[int] = ()
) -> Difference | None:
    """Return a - b paired by seed, of logarithms where the measure is a ratio."""
    sides = [_values(snapshot, arm, measure) for arm in (a, b)]
    return paired(*({seed: value for seed, value in side.items() if seed not in without} for side in sides))


def unpaired(snapshot: Snapshot, plus: Sequence[str], minus: Sequence[str], measure: Measure) -> Estimate | None:
    """Return the sum of some arms minus the sum of others with Welch's interval, of logarithms as `difference`."""
    return welch(*([_values(snapshot, arm, measure) for arm in arms] for arms in (plus, minus)))


def _values(snapshot: Snapshot, arm: str, measure: Measure) -> dict[int, float]:
    """{seed: value of an arm}, its logarithm where the measure is a ratio."""
    values = snapshot.values(arm, measure)
    return {s: math.log(x) for s, x in values.items() if x > 0} if measure.ratio else dict(values)


def compare(
    snapshot: Snapshot, part: ClaimPart, a: str | None, b: str | None, *, without: Collection[int] = ()
) -> PartVerdict:
    """Return what is known of a part with these arms, by itself: without its claim nothing is corrected for.

    Args:
      snapshot, part: what is compared.
      a, b: its arms; None for a choice that is still open.
      without: seeds that are left out.
    """
    measure = snapshot.study.measure(part.measure)
    d = difference(snapshot, a, b, measure, without=without) if a and b else None
    if d is None:
        return PartVerdict(part, measure, a or "", b or "", None, 0, 1.0, 1.0, 1.0, UNDECIDED)
    side = _side(part, measure)
    agreeing = sum(side * x > -part.margin for x in d.values)
    p = min(1.0, 2 * p_above(side * d.mean + part.margin, d.standard_error, d.n))
    against = min(1.0, 2 * p_above(-side * d.mean - part.margin, d.standard_error, d.n))
    enough = d.n >= MIN_SEEDS
    verdict = HOLDS if enough and p < ALPHA and agreeing >= d.n - 1 else UNDECIDED
    return PartVerdict(part, measure, a or "", b or "", d, agreeing, p, p, against, verdict)


def judge(snapshot: Snapshot, claim: Claim) -> ClaimVerdict:
    """Return the verdict on a claim, by `RULE`."""
    compared = [compare(snapshot, part, snapshot.choice(part.a), snapshot.choice(part.b)) for part in claim.parts]
    parts = []
    corrected = zip(holm([part.p for part in compared]), holm([part.p_against for part in compared]), strict=True)
    for part, (p_holm, p_against) in zip(compared, corrected, strict=True):
        enough = part.difference is not None and part.difference.n >= MIN_SEEDS
        opposed = OPPOSED if enough and part.p_against < ALPHA else part.verdict
        verdict = FAILS if enough and p_against < ALPHA else opposed
        parts.append(dataclasses.replace(part, p_holm=p_holm, p_against=p_against, verdict=verdict))
    verdicts = {part.verdict for part in parts}
    whole = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else UNDECIDED
    if whole != HOLDS:
        parts = [
            dataclasses.replace(part, verdict=UNCORRECTED) if part.verdict == HOLDS and part.p_holm >= ALPHA else part
            for part in parts
        ]
    return ClaimVerdict(claim, parts, whole)


def _side(part: ClaimPart, measure: Measure) -> int:
    """1 where the claim wants the difference above zero, -1 below."""
    return 1 if part.better == measure.higher else -1


def gains(snapshot: Snapshot, contrasts: Sequence[Contrast], measure: Measure) -> list[str] | None:
    """Return what differences from controls show of a measure, of those on the better side; None without the runs."""
    side, p, meanings = 1 if measure.higher else -1, [], []
    real = [contrast for contrast in contrasts if contrast[1] != snapshot.study.floor]
    for a, b, meaning in real:
        left, right = snapshot.choice(a), snapshot.choice(b)
        d = difference(snapshot, left, right, measure) if left and right else None
        if d and d.n >= MIN_SEEDS:
            p.append(min(1.0, 2 * p_above(side * d.mean, d.standard_error, d.n)))
            meanings.append(meaning)
    # Controls without runs count as if nothing were shown by them.
    corrected = holm([*p, *[1.0] * (len(real) - len(p))])[: len(p)]
    return [meaning for meaning, value in zip(meanings, corrected, strict=True) if value < ALPHA] if p else None
