import math
import types

import numpy as np
import pytest
import scipy.stats

from studies import verdicts
from studies.declaration import Claim, ClaimPart, Measure
from studies.statistics import estimate, holm, p_above, paired, sign_flip

A, B = (np.random.default_rng(seed).normal(10 + seed, 2, 7) for seed in (0, 1))


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_intervals_equal_scipys():
    e = estimate(A)
    low, high = scipy.stats.t.interval(0.95, len(A) - 1, A.mean(), scipy.stats.sem(A))
    assert (e.mean, e.low, e.high, e.n) == pytest.approx((A.mean(), low, high, 7))
    geometric = estimate(np.log([2.0, 8.0])).mapped(math.exp)
    assert geometric.mean == pytest.approx(4.0) and geometric.low * geometric.high == pytest.approx(16.0)
    assert math.isnan(estimate([1.0]).low)
    d = paired(by_seed(A), by_seed(B))
    interval = scipy.stats.ttest_rel(A, B).confidence_interval()
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high)) and d.values == pytest.approx(A - B)


def test_pairs_are_of_common_seeds():
    d = paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 1.0, 7: 0.0})
    assert d.values == (0.0, 0.5) and paired({0: 1.0}, {1: 1.0}) is None


def test_p_above_is_one_sided():
    d = A - B
    expected = scipy.stats.ttest_1samp(d, 0, alternative="greater").pvalue
    assert p_above(d.mean(), scipy.stats.sem(d), 7) == pytest.approx(expected)
    assert [p_above(1.0, math.nan, 1), p_above(1.0, 0.0, 3), p_above(0.0, 0.0, 3)] == [1.0, 0.0, 0.5]


def test_sign_flip_equals_scipys_exact_test():
    d = np.random.default_rng(0).normal(0.5, 1, 6)
    test = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d) == pytest.approx(test.pvalue)
    assert [sign_flip(np.arange(1.0, n + 1)) for n in (1, 3, 5)] == [1.0, 0.25, 0.0625]


def test_holm():
    # The smallest of four is multiplied by 4, the next by 3, and none falls below the previous one.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def snapshot(**arms):
    """Values of arms at the measure "top1", higher is better; "loss" has the same ones, lower is better."""
    measures = {"top1": Measure("top1", "", ""), "loss": Measure("loss", "", "", higher=False)}
    study = types.SimpleNamespace(measure=measures.__getitem__)
    return types.SimpleNamespace(study=study, values=lambda arm, measure: by_seed(arms.get(arm, ())))


def judge(parts, **arms):
    judged = verdicts.judge(snapshot(**arms), Claim("It is better.", parts))
    return judged.verdict, [part.verdict for part in judged.parts]


def part(measure="top1", **options):
    return ClaimPart("it is better", measure, ["x"], ["c"], **options)


@pytest.mark.parametrize(
    ("x", "options", "verdict", "agreeing"),
    [
        ((22.0, 22.4, 21.8, 22.1, 22.2), {}, "holds", 5),
        ((18.0, 18.4, 17.8, 18.1, 18.2), {}, "fails", 0),
        ((18.0, 18.4, 17.8, 18.1, 18.2), {"measure": "loss"}, "holds", 5),
        ((23.0, 18.4, 21.8, 19.1, 22.2), {}, "undecided", 3),
        ((20.1, 19.9, 20.2, 19.8, 20.0), {}, "undecided", 2),
        ((22.0, 22.0), {}, "undecided", 2),
    ],
)
def test_verdicts_on_a_part(x, options, verdict, agreeing):
    values = snapshot(x=x, c=[20.0] * len(x))
    (judged,) = verdicts.judge(values, Claim("", (part(**options),))).parts
    assert (judged.verdict, judged.agreeing) == (verdict, agreeing)
    assert judged.difference.mean == pytest.approx(np.mean(x) - 20)


def test_claims_need_all_parts_and_fail_by_one():
    base = [20.0] * 4
    strong = {"x": (21.9, 22.0, 22.1, 22.0), "c": base}
    worse = part("loss")
    assert judge((part(),), **strong) == ("holds", ["holds"])
    assert judge((part(), worse), **strong) == ("fails", ["holds", "fails"])
    assert judge((part(),)) == ("undecided", ["undecided"])  # without runs
    # p of 0.043 is shown alone and not in a claim with an undecided part, and so is p against.
    unknown = ClaimPart("unknown", "top1", ["y"], ["c"])
    up = {"x": (20.4, 21.2, 22.3, 22.1), "c": base}
    assert judge((part(),), **up) == ("holds", ["holds"])
    assert judge((part(), unknown), **up) == ("undecided", [verdicts.UNCORRECTED, "undecided"])
    assert judge((worse,), **up) == ("fails", ["fails"])
    assert judge((worse, unknown), **up) == ("undecided", [verdicts.OPPOSED, "undecided"])


def test_differences_of_differences():
    values = snapshot(a=(5.0, 6.0), b=(1.0, 1.0), c=(3.0, 3.0), d=(2.0, 1.0))
    d = verdicts.difference(values, ClaimPart("", "top1", ["a", "d:loss"], ["b", "c"]))
    assert d.values == (3.0, 3.0)  # (a - b) - (c - d)
