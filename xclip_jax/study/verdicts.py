"""Verdicts: what the differences between arms say about the parts of a claim, by one written rule."""

import dataclasses
import math

from xclip_jax.study.declaration import Claim, Measure, Part
from xclip_jax.study.matrix import Snapshot
from xclip_jax.study.statistics import Difference, holm, p_above, paired

ALPHA = 0.05
MIN_SEEDS = 3
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
RULE = (
    'A part *holds* if the 95 % interval of the paired difference is on the claimed side (of an "at least as good": '
    "of minus its margin) and at most one seed has the other sign. It *fails* if the interval is wholly on the other "
    "side of zero and stays so after Holm's correction over the parts of the claim. Else, and with fewer than three "
    "seeds, it is *undecided at this scale*. A claim holds if all of its parts hold: that needs no correction, since "
    "each must be shown (an intersection-union test). It fails if one part fails: that is what Holm's correction is "
    "for, since one false alarm among several would do. The interval is Student's t over seeds. p of the sign-flip "
    "test is exact and assumes no distribution, but cannot be below 2 / 2^n (0.0625 for five seeds): it is reported "
    "and decides nothing."
)


@dataclasses.dataclass(frozen=True)
class PartVerdict:
    """What is known of a part.

    Attributes:
      part, measure: which.
      a, b: the arms that were compared; "" for a choice that is still open.
      difference: a - b, of logarithms where the measure is a ratio; None without a common seed.
      agreeing: seeds whose difference has the claimed sign, margin included.
      p: two-sided p that the difference is not zero, after Holm's correction within the claim.
      verdict: one of `HOLDS`, `FAILS`, `UNDECIDED`.
    """

    part: Part
    measure: Measure
    a: str
    b: str
    difference: Difference | None
    agreeing: int
    p: float
    verdict: str


@dataclasses.dataclass(frozen=True)
class ClaimVerdict:
    """A claim with the verdicts on its parts."""

    claim: Claim
    parts: list[PartVerdict]
    verdict: str


def difference(snapshot: Snapshot, a: str, b: str, measure: Measure) -> Difference | None:
    """Return a - b paired by seed, of logarithms where the measure is a ratio."""
    sides = [snapshot.values(arm, measure) for arm in (a, b)]
    if measure.ratio:
        sides = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in sides]
    return paired(*sides)


def judge(snapshot: Snapshot, claim: Claim) -> ClaimVerdict:
    """Return the verdict on a claim, by `RULE`."""
    rows = []
    for part in claim.parts:
        measure = snapshot.study.measure(part.measure)
        a, b = (snapshot.choice(name) or "" for name in (part.a, part.b))
        rows.append((part, measure, a, b, difference(snapshot, a, b, measure) if a and b else None))
    against = holm([_p_against(part, measure, d) for part, measure, _, _, d in rows])
    different = holm([1.0 if d is None else d.p_t for *_, d in rows])
    parts = []
    for (part, measure, a, b, d), p_against, p in zip(rows, against, different, strict=True):
        agreeing = 0 if d is None else sum(_side(part, measure) * x > -part.margin for x in d.values)
        verdict = UNDECIDED
        if d is not None and d.n >= MIN_SEEDS:
            if p_against < ALPHA:
                verdict = FAILS
            elif _p_for(part, measure, d) < ALPHA and agreeing >= d.n - 1:
                verdict = HOLDS
        parts.append(PartVerdict(part, measure, a, b, d, agreeing, p, verdict))
    verdicts = {part.verdict for part in parts}
    whole = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else UNDECIDED
    return ClaimVerdict(claim, parts, whole)


def _side(part: Part, measure: Measure) -> int:
    """1 where the claim wants the difference above zero, -1 below."""
    return 1 if part.better == measure.higher else -1


def _p_for(part: Part, measure: Measure, d: Difference) -> float:
    """Two-sided p that the difference, in the claimed direction, is above minus the margin."""
    return min(1.0, 2 * p_above(_side(part, measure) * d.mean + part.margin, d.standard_error, d.n))


def _p_against(part: Part, measure: Measure, d: Difference | None) -> float:
    """Two-sided p that the difference is on the other side of zero."""
    return 1.0 if d is None else min(1.0, 2 * p_above(-_side(part, measure) * d.mean, d.standard_error, d.n))
