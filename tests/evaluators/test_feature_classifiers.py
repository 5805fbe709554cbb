"""Nearest neighbours, parts of a training set, the search of C and cross-validation against scikit-learn."""

import re
import types

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier

from tests.evaluators.test_logistic import overlapping
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import feature_classifiers, logistic
from xclip_jax.evaluators.feature_classifiers import Sweep


@pytest.mark.parametrize("chunk", [1 << 25, 600 * 7])
def test_knn_equals_sklearn(chunk, monkeypatch):
    monkeypatch.setattr(feature_classifiers, "_CHUNK", chunk)
    (x, y), (held, _) = overlapping(), overlapping(n=100, seed=1)
    peer = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x - 1, y)
    votes = feature_classifiers.knn(x - 1, y, held - 1, 7)
    share = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share, peer.predict_proba(held - 1), atol=1e-3)
    assert (votes.argmax(axis=1) == peer.predict(held - 1)).all()
    few = feature_classifiers.knn(np.eye(3), np.array([0, 1, 1]), np.array([[1.0, 0.1, 0.0]]), 2)
    assert few.argmax() == 0 and few.shape == (1, 2)  # fewer items than neighbours


def test_knn_of_other_features_is_the_same_program():
    """The training set is no constant of it: one as large as ImageNet's could not be."""
    votes = feature_classifiers._vote.lower(
        np.zeros((4, 8), np.float32), np.ones((300, 8), np.float32), np.zeros(300, int), k=5, classes=3
    ).as_text()
    assert "tensor<300x8xf32>" in votes and not re.search(r"constant .*tensor<300", votes)


@pytest.mark.parametrize(("wanted", "reached"), [(1.3, 1.25), (-9.0, -6.0), (9.0, 6.0), (5.8, 5.75)])
def test_the_search_is_clips_and_stays_within_its_range(wanted, reached, monkeypatch):
    tried = []

    def fit(x, y, cs, classes, tolerance):
        tried.append(cs)
        return types.SimpleNamespace(logits=lambda x: np.array(cs))

    monkeypatch.setattr(logistic, "fit", fit)
    best = feature_classifiers.search((0, 0), (0, 0), 2, Sweep(), lambda c, _: -abs(np.log10(c) - wanted))
    assert np.log10(best) == pytest.approx(reached)
    assert tried[0] == [10.0**e for e in range(-6, 7, 2)]
    assert min(map(min, tried)) == 1e-6 and max(map(max, tried)) == 1e6
    if wanted == 1.3:
        assert [len(cs) for cs in tried[1:]] == [2, 2, 2, 2]  # the end: eight steps per decade
    assert feature_classifiers.search((0, 0), (0, 0), 2, Sweep((1.0, 10.0), 0), lambda c, _: 0.0) == 1.0


def test_given_validation_items_are_fitted_on_unless_refit_is_off():
    x, y = overlapping(n=90, d=6, k=3, spread=0.4)
    parts = [(x[part], y[part]) for part in (slice(30), slice(30, 60), slice(60, 90))]

    def right(items, c):
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(items[0], items[1])
        return (model.predict(x[60:]) == y[60:]).astype(float)

    def accuracy(logits, labels):
        return float((logits.argmax(1) == labels).mean())

    for refit, items in ((True, (x[:60], y[:60])), (False, (x[:30], y[:30]))):
        sweep = Sweep((1e-2, 1.0), 0, 1e-7, refit=refit)
        found, extra = feature_classifiers.linear(*parts, 3, sweep, accuracy)
        np.testing.assert_array_equal(found, right(items, 10 ** extra["log10_c"]))
    # Without validation items a tenth, at random, chooses C, and all items are fitted on.
    some = np.random.default_rng(0).permutation(60)
    held, kept = (x[some[:6]], y[some[:6]]), (x[some[6:]], y[some[6:]])
    scores = [LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(*kept).score(*held) for c in (1e-3, 1.0)]
    parts = [(x[:60], y[:60]), (x[:0], y[:0]), (x[60:], y[60:])]
    found, extra = feature_classifiers.linear(*parts, 3, Sweep((1e-3, 1.0), 0, 1e-7), accuracy)
    assert scores[0] != scores[1] and 10 ** extra["log10_c"] == pytest.approx((1e-3, 1.0)[int(np.argmax(scores))])
    np.testing.assert_array_equal(found, right(parts[0], 10 ** extra["log10_c"]))
    assert np.any(right((x[:60], y[:60]), 1.0) != right((x[:30], y[:30]), 1.0))
    with pytest.raises(UserError, match="one training item and no validation split"):
        feature_classifiers.linear((x[:1], y[:1]), *parts[1:], 3, sweep, accuracy)


def test_folds_are_even_and_stratified():
    labels = np.repeat([0, 1, 2], [55, 30, 17])
    tests = np.array([test for _, test in feature_classifiers.folds(labels, 10)])
    assert set(tests.sum(axis=1)) == {10, 11} and (tests.sum(axis=0) == 1).all()
    for label in range(3):
        assert np.ptp(tests[:, labels == label].sum(axis=1)) <= 1


@pytest.mark.filterwarnings("error")
def test_fewer_items_than_folds():
    """Empty folds are left out, so that C is chosen among numbers: here the smallest of equals."""
    y = np.repeat([0, 1], 4)
    x = 10 * np.eye(2, dtype=np.float32)[y]
    assert feature_classifiers.choose(x, y, 2, [0.1, 1.0], 10, 1e-5) == 0.1
    right, extra = feature_classifiers.nested(x, y, 2, [0.1, 1.0], 10, 1e-5)
    assert right.tolist() == [1] * 8 and extra["log10_c"] == -1


def test_nested_folds_equal_sklearns():
    """scikit-learn's grid search inside its cross-validation, on the same folds."""
    x, y = overlapping(n=60, d=6, k=3, spread=0.4)
    cs = [1e-3, 0.1, 10.0]
    right, extra = feature_classifiers.nested(x, y, 3, cs, 2, 1e-6)
    chosen = []
    for train, test in feature_classifiers.folds(y, 2):
        inner = list(feature_classifiers.folds(y[train], 2))
        search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), {"C": cs}, cv=inner)
        search.fit(x[train].astype(np.float64), y[train])
        chosen.append(np.log10(search.best_params_["C"]))
        assert np.mean((search.predict(x[test]) == y[test]) == right[test]) >= 0.96
    assert extra["log10_c"] == pytest.approx(np.mean(chosen))
