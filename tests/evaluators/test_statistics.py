import types

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from etils import epath

from tests.helpers.made_results import entry
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import results, statistics, tables


def test_average_precision_against_sklearn_and_ties():
    rng = np.random.default_rng(0)
    s, y = rng.normal(size=(200, 6)), rng.random((200, 6)) < 0.2
    y[:, 5] = False
    mine = statistics.average_precision(s, y)
    peer = [sklearn.metrics.average_precision_score(y[:, k], s[:, k]) for k in range(5)]
    np.testing.assert_allclose(mine, [*peer, 0], atol=1e-9)
    assert statistics.average_precision(np.zeros((2, 1)), np.array([[False], [True]])) == [0.5]


def test_eleven_points():
    # By hand: hits at ranks 1, 3 and 6; recall 1/3 at precision 1, 2/3 at 2/3, 1 at 1/2.
    y = np.array([1, 0, 1, 0, 0, 1])[:, None]
    expected = (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11
    assert statistics.eleven_point(-np.arange(6.0)[:, None], y)[0] == pytest.approx(expected)
    ten = np.ones((10, 1), bool)  # recall 3/10 is not 0.30000000000000004
    assert statistics.eleven_point(np.zeros((10, 1)), ten)[0] == 1
    assert statistics.eleven_point(np.zeros((3, 1)), np.zeros((3, 1)))[0] == 0


def test_roc_auc_f1_and_correlations_against_sklearn_and_scipy():
    rng = np.random.default_rng(0)
    s, y = rng.integers(0, 9, 300), rng.random(300) < 0.3
    t = s + rng.integers(0, 9, 300)
    assert statistics.roc_auc(s, y) == pytest.approx(sklearn.metrics.roc_auc_score(y, s))
    assert statistics.spearman(s, t) == pytest.approx(scipy.stats.spearmanr(s, t).statistic)
    assert statistics.pearson(s, t) == pytest.approx(scipy.stats.pearsonr(s, t).statistic)
    assert statistics.f1(s > 4, y) == pytest.approx(sklearn.metrics.f1_score(y, s > 4))
    assert statistics.STATISTICS["matthews"](s > 4, y) == pytest.approx(sklearn.metrics.matthews_corrcoef(y, s > 4))
    assert statistics.spearman(np.zeros(300), t) == 0 and statistics.spearman(np.full(300, np.nan), t) == 0
    with pytest.raises(UserError, match="0 of 3 are positive"):
        statistics.roc_auc(np.arange(3), np.zeros(3))


def test_the_bootstrap_covers_and_is_paired():
    rng = np.random.default_rng(0)
    a = (rng.random(400) < 0.5).astype(float)
    better = np.where(rng.random(400) < 0.2, 1.0, a)
    low, high = statistics.bootstrap(statistics.PerExample(a), statistics.PerExample(better))
    assert 0 < low < 100 * (better - a).mean() < high
    deviation = 100 * (better - a).std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)
    assert statistics.bootstrap(statistics.PerExample(a), statistics.PerExample(a)) == (0, 0)
    with pytest.raises(UserError, match="400 and 3 items"):
        statistics.bootstrap(statistics.PerExample(a), statistics.PerExample(a[:3]))


@pytest.mark.parametrize("statistic", ["map", "map11", "roc_auc", "spearman", "f1", "matthews"])
def test_the_bootstrap_of_other_statistics(statistic):
    """Items are drawn again and the statistic is computed anew, on the same items for both sides."""
    rng = np.random.default_rng(0)
    y = rng.random((80, 3)) < 0.3 if statistic.startswith("map") else rng.random(80) < 0.4
    values = [y + scale * rng.normal(size=y.shape) for scale in (1.5, 0.3)]
    if statistic in ("f1", "matthews"):
        values = [(v > 0.5).astype(int) for v in values]
    gold = y.astype(float) + 0.01 * rng.random(80) if statistic in ("spearman", "pearson") else y
    a, b = (statistics.PerExample(v, other=gold, statistic=statistic) for v in values)
    low, high = statistics.bootstrap(a, b, samples=100)
    assert 0 < low <= b.value() - a.value() <= high
    draws = np.random.default_rng(0)
    again = [b.value(i) - a.value(i) for i in (draws.integers(0, 80, 80) for _ in range(100))]
    assert (low, high) == pytest.approx(np.percentile(again, [2.5, 97.5]))
    assert a.value() == pytest.approx(100 * statistics.STATISTICS[statistic](values[0], gold))


@pytest.mark.parametrize("statistic", ["mean", "gmean"])
def test_the_bootstrap_draws_whole_groups(statistic):
    """The same as drawing groups by hand; where a group's items are alike, its interval is wider by far."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 12, 30)))
    value = rng.random(30)[groups] + 0.5
    weights = rng.random(len(groups)) + 0.5
    a, b = (
        statistics.PerExample(v, weights=weights, statistic=statistic, groups=groups)
        for v in (value, value + rng.normal(0.3, 0.3, 30).clip(-0.4)[groups])
    )
    low, high = statistics.bootstrap(a, b, samples=200)
    draws, again = np.random.default_rng(0), []
    for _ in range(200):
        items = np.concatenate([np.flatnonzero(groups == g) for g in draws.integers(0, 30, 30)])
        to, back = (np.log, np.exp) if statistic == "gmean" else (np.asarray, lambda mean: 100 * mean)
        means = [back(np.average(to(x.values[items]), weights=weights[items])) for x in (a, b)]
        again.append(means[1] - means[0])
    assert (low, high) == pytest.approx(np.percentile(again, [2.5, 97.5]))
    alone = [statistics.PerExample(x.values, weights=weights, statistic=statistic) for x in (a, b)]
    inner_low, inner_high = statistics.bootstrap(*alone, samples=200)
    assert high - low > 1.5 * (inner_high - inner_low)


def test_the_bootstrap_of_one_kind_of_item_has_no_interval(monkeypatch):
    """Each of a few resamples has positive items alone."""
    first = types.SimpleNamespace(integers=lambda low, high, n: np.zeros(n, int))
    monkeypatch.setattr(statistics.np.random, "default_rng", lambda seed: first)
    y = np.array([True, False, False])
    a, b = (statistics.PerExample(np.array(v), other=y, statistic="roc_auc") for v in ([1.0, 2, 3], [3.0, 2, 1]))
    assert np.isnan(statistics.bootstrap(a, b, samples=3)).all()


def test_a_comparison_without_an_interval_leaves_it_out(tmp_path):
    fields = entry("zeroshot/pcam", set="pcam", metric="roc_auc", value=60.0)
    for name, values in (("a", [1.0, 2]), ("b", [2.0, 1])):
        items = statistics.PerExample(np.array(values), other=np.array([True, True]), statistic="roc_auc")
        results.add(epath.Path(tmp_path / name), fields, {"zeroshot/pcam/roc_auc": items}, {}, own=True)
    (row,) = tables.compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert row["difference"] == 0 and "low" not in row
    assert tables.render_comparison([row], "a", "b").splitlines()[-1].endswith("+0.0")


def test_values_may_be_bools():
    for values, trials in (([True, False], 2), ([True, True], 2)):
        items = statistics.PerExample(np.array(values))
        assert items.trials() == trials == statistics.PerExample(np.array(values, float)).trials()
        assert items.value() == 50 * sum(values)
    grouped = statistics.PerExample(np.array([True, True, True]), groups=np.array([0, 0, 1]))
    assert grouped.trials() == 2  # (2 + 1)^2 / (2^2 + 1^2) = 1.8


def test_scores_that_are_not_numbers_have_no_precision():
    y = np.array([[True, True], [False, False], [True, True]])
    s = np.array([[3.0, 3], [2, np.nan], [1, 1]])
    for measure in (statistics.average_precision, statistics.eleven_point):
        first, second = measure(s, y)
        assert first > 0.8 and second == 0
    excluded = statistics.average_precision(np.array([[3.0], [-np.inf], [1]]), y[:, :1])
    assert excluded == [1.0]  # minus infinity is the lowest score


def test_the_bootstrap_leaves_out_draws_of_items_without_weight():
    items = statistics.PerExample(np.array([1.0, 0, 1, 0, 1]), weights=np.array([1.0, 0, 0, 0, 1]))
    assert statistics.bootstrap(items) == (100, 100)
