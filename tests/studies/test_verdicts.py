"""Studies: verdicts on claims and on their parts."""

import dataclasses

import numpy as np
import pytest

from studies import verdicts
from studies.declaration import Claim, ClaimPart
from studies.matrix import Snapshot
from tests.studies import tiny_study
from tests.studies.made_records import finished
from tests.studies.tiny_study import four_seeds, over_seeds


def claimed(a, b, **options):
    """The verdict on one part, of arms with these values for seeds 0 and up."""
    seeds = tuple(range(len(a)))
    declared = tiny_study.study(tuned=False)
    of_arms = tuple(dataclasses.replace(arm, seeds=seeds) for arm in declared.arms)
    part = ClaimPart("it is better", "xclip", "clip", "top1", **options)
    m = tiny_study.matrix(tuned=False, arms=of_arms, claims=(Claim("It is better.", (part,)),))
    made = finished(m, {"xclip": dict(enumerate(a)), "clip": dict(enumerate(b))})
    return verdicts.judge(Snapshot(m, made), m.study.claims[0]).parts[0]


@pytest.mark.parametrize(
    ("a", "options", "verdict", "agreeing"),
    [
        ((22.0, 22.4, 21.8, 22.1, 22.2), {}, "holds", 5),
        ((18.0, 18.4, 17.8, 18.1, 18.2), {}, "fails", 0),
        ((18.0, 18.4, 17.8, 18.1, 18.2), {"better": False}, "holds", 5),
        ((22.0, 22.4, 21.8, 22.1, 22.2), {"better": False}, "fails", 0),
        ((23.0, 18.4, 21.8, 19.1, 22.2), {}, "undecided", 3),
        ((20.1, 19.9, 20.2, 19.8, 20.0), {"margin": 1.0}, "holds", 5),
        ((20.1, 19.9, 20.2, 19.8, 20.0), {}, "undecided", 2),
        ((19.5, 19.4, 19.6, 19.5, 19.4), {"margin": 1.0}, "holds", 5),
        ((18.9, 19.2, 18.8, 19.1, 19.0), {"margin": 1.0}, "undecided", 2),
        ((18.5, 18.4, 18.6, 18.5, 18.4), {"margin": 1.0}, "fails", 0),
        ((21.5, 21.6, 21.4, 21.5, 21.6), {"margin": 1.0, "better": False}, "fails", 0),
        ((22.0, 22.0), {}, "undecided", 2),
        ((22.0,), {}, "undecided", 1),
    ],
)
def test_verdicts_on_a_part(a, options, verdict, agreeing):
    part = claimed(a, [20.0] * len(a), **options)
    assert (part.verdict, part.agreeing) == (verdict, agreeing)
    assert part.difference.mean == pytest.approx(np.mean(a) - 20)


def test_a_claim_is_as_good_as_its_parts():
    seeds = (0, 1, 2)
    of_arms = tuple(dataclasses.replace(arm, seeds=seeds) for arm in tiny_study.study(tuned=False).arms)
    m = tiny_study.matrix(tuned=False, arms=of_arms)
    parts = (ClaimPart("better", "xclip", "clip", "top1"), ClaimPart("worse", "xclip", "clip", "top1", better=False))
    values = {"clip": dict.fromkeys(seeds, 20.0), "xclip": dict.fromkeys(seeds, 22.0)}
    snapshot = Snapshot(m, finished(m, values))
    judged = [verdicts.judge(snapshot, Claim("", chosen)).verdict for chosen in (parts[:1], parts[1:], parts)]
    assert judged == ["holds", "fails", "fails"]
    assert verdicts.judge(Snapshot(m, {}), Claim("", parts)).verdict == "undecided"


def test_a_part_of_a_claim_that_does_not_hold_is_shown_after_correction():
    """The same numbers hold alone, and with a part that holds too; beside one that does not p counts for both."""
    seeds = (0, 1, 2, 3)
    of_arms = tuple(dataclasses.replace(arm, seeds=seeds) for arm in tiny_study.study(tuned=False).arms)
    m = tiny_study.matrix(tuned=False, arms=of_arms)
    up, down = ClaimPart("up", "xclip", "clip", "top1"), ClaimPart("down", "xclip", "clip", "top1", better=False)
    wide = ClaimPart("not far down", "xclip", "clip", "top1", margin=9.0)

    def verdicts_of(differences, *parts):
        values = {"clip": dict.fromkeys(seeds, 20.0), "xclip": {i: 20 + x for i, x in enumerate(differences)}}
        judged = verdicts.judge(Snapshot(m, finished(m, values)), Claim("It is better.", parts))
        return judged, [part.verdict for part in judged.parts]

    weak, strong = (0.4, 1.2, 2.3, 2.1), (1.9, 2.0, 2.1, 2.0)  # p of 0.043, and far below 0.05
    nothing = ClaimPart("the loss differs", "xclip", "clip", "loss")
    assert verdicts_of(weak, up)[1] == ["holds"] and verdicts_of(weak, up, wide)[1] == ["holds", "holds"]
    judged, of_parts = verdicts_of(weak, up, nothing)
    assert (judged.verdict, of_parts) == ("undecided", [verdicts.UNCORRECTED, "undecided"])
    assert judged.parts[0].p < 0.05 < judged.parts[0].p_holm == pytest.approx(2 * judged.parts[0].p)
    assert verdicts_of(strong, up, nothing)[1] == ["holds", "undecided"]
    # The margin counts in the correction too: far above it a part is shown in a claim that fails.
    assert verdicts_of(weak, wide, nothing)[1] == ["holds", "undecided"]
    assert verdicts_of(strong, wide, down)[1] == ["holds", "fails"]


def test_a_part_on_the_other_side_is_named_as_one_on_the_claimed_side():
    """p of 0.043 against a part: undecided nowhere, refuted alone, and before correction beside another part."""
    m = four_seeds()
    values = {"clip": over_seeds(20.0, 20.0, 20.0, 20.0), "xclip": over_seeds(19.6, 18.8, 17.7, 17.9)}
    snapshot = Snapshot(m, finished(m, values))
    better, loss = ClaimPart("up", "xclip", "clip", "top1"), ClaimPart("the loss differs", "xclip", "clip", "loss")
    alone, both = (verdicts.judge(snapshot, Claim("It is better.", parts)) for parts in ((better,), (better, loss)))
    assert (alone.verdict, both.verdict) == ("fails", "undecided")
    assert [part.verdict for part in both.parts] == [verdicts.OPPOSED, "undecided"]
