import math
import types

import numpy as np
import pytest
import scipy.stats

from studies import verdicts
from studies.declaration import Claim, ClaimPart, Measure
from studies.statistics import estimate, holm, p_above, paired, sign_flip, unpaired

A, B = (np.random.default_rng(seed).normal(10 + seed, 2, 7) for seed in (0, 1))


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_intervals_equal_scipys():
    e = estimate(A)
    low, high = scipy.stats.t.interval(0.95, len(A) - 1, A.mean(), scipy.stats.sem(A))
    assert (e.mean, e.low, e.high, e.n) == pytest.approx((A.mean(), low, high, 7))
    geometric = estimate(np.log([2.0, 8.0])).mapped(math.exp)
    assert geometric.mean == pytest.approx(4.0) and geometric.low * geometric.high == pytest.approx(16.0)
    d = paired(by_seed(A), by_seed(B))
    interval = scipy.stats.ttest_rel(A, B).confidence_interval()
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high)) and d.values == pytest.approx(A - B)
    d = paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 1.0, 7: 0.0})
    assert d.values == (0.0, 0.5) and paired({0: 1.0}, {1: 1.0}) is None and math.isnan(estimate([1.0]).low)


def test_unpaired_intervals():
    e = unpaired([A], [B], [A, B])
    interval = scipy.stats.ttest_ind(A, B).confidence_interval()
    assert (e.mean, e.low, e.high, e.n) == pytest.approx((A.mean() - B.mean(), interval.low, interval.high, 7))
    assert unpaired([A], [B], [A, B, []]) == e
    corrected = scipy.stats.ttest_ind(A, B).confidence_interval(1 - 0.05 / 4)
    e = unpaired([A], [B], [A, B], comparisons=4)
    assert (e.low, e.high) == pytest.approx((corrected.low, corrected.high))
    # Two differences of arms with 7, 7, 3 and 2 values, against least squares with a column for each arm.
    arms = [A, B, A[:3] + 1, B[2:4]]
    design = np.repeat(np.eye(4), [7, 7, 3, 2], axis=0)
    means, residual, *_ = np.linalg.lstsq(design, np.concatenate(arms))
    contrast = np.array([1, -1, -1, 1])
    error = math.sqrt(residual[0] / 15 * contrast @ np.linalg.inv(design.T @ design) @ contrast)
    e = unpaired([arms[0], arms[3]], [arms[1], arms[2]], arms)
    assert (e.mean, e.n) == (pytest.approx(contrast @ means), 2)
    assert e.high - e.mean == pytest.approx(scipy.stats.t.ppf(0.975, 15) * error)
    assert math.isnan(unpaired([A[:1]], [B[:1]], [A[:1], B[:1]]).low) and unpaired([A], [[]], [A]) is None


def test_p_values_equal_scipys():
    d = A - B
    expected = scipy.stats.ttest_1samp(d, 0, alternative="greater").pvalue
    assert p_above(d.mean(), scipy.stats.sem(d), 7) == pytest.approx(expected)
    assert [p_above(1.0, math.nan, 1), p_above(1.0, 0.0, 3), p_above(0.0, 0.0, 3)] == [1.0, 0.0, 0.5]
    test = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d) == pytest.approx(test.pvalue)
    assert [sign_flip(np.arange(1.0, n + 1)) for n in (1, 3, 5)] == [1.0, 0.25, 0.0625]


def test_holm():
    # The smallest of four is multiplied by 4, the next by 3, and none falls below the previous one.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def matrix(**arms):
    """Values of arms at the measure "top1", higher is better; "loss" has the same ones, lower is better."""
    measures = {"top1": Measure("top1", "", ""), "loss": Measure("loss", "", "", higher=False)}
    study = types.SimpleNamespace(measure=measures.__getitem__)
    return types.SimpleNamespace(study=study, values=lambda arm, measure: by_seed(arms.get(arm, ())))


def judge(parts, **arms):
    judged = verdicts.judge(matrix(**arms), Claim("It is better.", parts))
    assert [part.p_against_holm for part in judged.parts] == holm([part.p_against for part in judged.parts])
    return judged.verdict, [part.verdict for part in judged.parts]


BETTER, LESS = (ClaimPart("it is better", measure, ["x"], ["c"]) for measure in ("top1", "loss"))


@pytest.mark.parametrize(
    ("x", "part", "verdict", "agreeing"),
    [
        ((22.0, 22.4, 21.8, 22.1, 22.2), BETTER, "holds", 5),
        ((18.0, 18.4, 17.8, 18.1, 18.2), BETTER, "fails", 0),
        ((18.0, 18.4, 17.8, 18.1, 18.2), LESS, "holds", 5),
        ((23.0, 18.4, 21.8, 19.1, 22.2), BETTER, "undecided", 3),
        ((22.0, 22.0), BETTER, "undecided", 2),
    ],
)
def test_verdicts_on_a_part(x, part, verdict, agreeing):
    (judged,) = verdicts.judge(matrix(x=x, c=[20.0] * len(x)), Claim("", (part,))).parts
    assert (judged.verdict, judged.agreeing) == (verdict, agreeing)


def test_claims_need_all_parts_and_fail_by_one():
    strong = {"x": (21.9, 22.0, 22.1, 22.0), "c": [20.0] * 4}
    assert judge((BETTER, LESS), **strong) == ("fails", ["holds", "fails"])
    assert judge((BETTER,)) == ("undecided", ["undecided"])  # without runs
    # p of 0.043 is shown alone and not in a claim with an undecided part, and so is p against.
    unknown = ClaimPart("unknown", "top1", ["y"], ["c"])
    up = {"x": (20.4, 21.2, 22.3, 22.1), "c": [20.0] * 4}
    assert judge((BETTER,), **up) == ("holds", ["holds"])
    assert judge((BETTER, unknown), **up) == ("undecided", [verdicts.UNCORRECTED, "undecided"])
    assert judge((LESS,), **up) == ("fails", ["fails"])
    assert judge((LESS, unknown), **up) == ("undecided", [verdicts.OPPOSED, "undecided"])


def test_differences_of_differences():
    values = matrix(a=(5.0, 6.0), b=(1.0, 1.0), c=(3.0, 3.0), d=(2.0, 1.0))
    d = verdicts.difference(values, ClaimPart("", "top1", ["a", "d:loss"], ["b", "c"]))
    assert d.values == (3.0, 3.0)  # (a - b) - (c - d)
