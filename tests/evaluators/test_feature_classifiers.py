"""Nearest neighbours, parts of a training set, the search of C and cross-validation against scikit-learn."""

import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
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


def test_knn_of_fewer_items_than_neighbours():
    votes = feature_classifiers.knn(np.eye(3), np.array([0, 1, 1]), np.array([[1.0, 0.1, 0.0]]), 2)
    assert votes.argmax() == 0 and votes.shape == (1, 2)


def test_knn_of_other_features_is_the_same_program():
    """The training set is no constant of it: one as large as ImageNet's could not be."""
    votes = feature_classifiers._vote.lower(
        np.zeros((4, 8), np.float32), np.ones((300, 8), np.float32), np.zeros(300, int), 0.07, k=5, classes=3
    ).as_text()
    assert "tensor<300x8xf32>" in votes and not re.search(r"constant .*tensor<300", votes)


def test_parts_of_a_training_set():
    labels = np.repeat([0, 1, 2], [200, 50, 30])
    assert np.bincount(labels[feature_classifiers.subset(labels, "5-shot")]).tolist() == [5, 5, 5]
    assert np.bincount(labels[feature_classifiers.subset(labels, "10%")]).tolist() == [20, 5, 3]
    assert np.bincount(labels[feature_classifiers.subset(labels, "1%")]).tolist() == [2, 1, 1]
    assert (feature_classifiers.subset(labels, "5-shot", 0) != feature_classifiers.subset(labels, "5-shot", 1)).any()
    wrong = (
        ("five", "'five'; expected"),
        ("0-shot", "unknown"),
        ("200%", "unknown"),
        ("31-shot", "class 2"),
        ("nan%", "'nan%'; expected"),
        ("-5%", "unknown"),
        ("inf%", "unknown"),
        ("inf-shot", "unknown"),
    )
    for amount, message in wrong:
        with pytest.raises(UserError, match=message):
            feature_classifiers.subset(labels, amount)


def test_where_a_part_of_a_training_set_chooses_c(monkeypatch):
    y = np.repeat([0, 1, 2], [20, 20, 4])
    train, none, held = (np.arange(44.0)[:, None], y), (np.zeros((0, 1)), y[:0]), (np.ones((2, 1)), y[:2])
    one, two = np.array([0, 1, 20, 40]), np.array([0, 1, 20, 21, 40, 41])
    for part in (one, two):
        assert feature_classifiers.to_choose_c(train, part, held, 0) is held
    assert feature_classifiers.to_choose_c(train, two, none, 0) is none  # a tenth of the part is held out
    x, labels = feature_classifiers.to_choose_c(train, one, none, 0)
    assert sorted(x[:, 0]) == sorted(set(range(44)) - set(one)) and (labels == y[x[:, 0].astype(int)]).all()
    monkeypatch.setattr(feature_classifiers, "_MOST_FOR_C", 9)
    x, labels = feature_classifiers.to_choose_c(train, one, none, 1)
    assert len(x) == len(labels) == len(set(x[:, 0])) == 9


def test_the_search_is_clips(monkeypatch):
    tried = []

    class Fit:
        def __init__(self, cs):
            self.cs = cs

        def logits(self, x):
            return np.array(self.cs)

    def fit(x, y, cs, classes, tolerance):
        tried.append(cs)
        return Fit(cs)

    monkeypatch.setattr(logistic, "fit", fit)
    best, found = feature_classifiers.search((0, 0), (0, 0), 2, Sweep(), lambda c, _: -abs(np.log10(c) - 1.3))
    assert tried[0] == [10.0**e for e in range(-6, 7, 2)]
    assert [len(cs) for cs in tried[1:]] == [2, 2, 2, 2]
    assert np.log10(best) == pytest.approx(1.25) and len(found) == 15  # the end: eight steps a decade
    best, _ = feature_classifiers.search((0, 0), (0, 0), 2, Sweep((1.0, 10.0), 0), lambda c, _: 0.0)
    assert best == 1.0


@pytest.mark.parametrize(("wanted", "reached"), [(-9.0, -6.0), (9.0, 6.0), (5.8, 5.75)])
def test_the_search_stays_within_its_range(wanted, reached, monkeypatch):
    class Fit:
        def __init__(self, cs):
            self.cs = cs

        def logits(self, x):
            return np.array(self.cs)

    monkeypatch.setattr(logistic, "fit", lambda x, y, cs, classes, tolerance: Fit(cs))
    best, scores = feature_classifiers.search((0, 0), (0, 0), 2, Sweep(), lambda c, _: -abs(np.log10(c) - wanted))
    assert np.log10(best) == pytest.approx(reached)
    assert min(scores) == 1e-6 and max(scores) == 1e6


def test_a_probe_of_too_few_items_to_choose_c():
    x, y, none = np.ones((3, 2), np.float32), np.array([0, 1, 1]), (np.zeros((0, 2), np.float32), np.array([], int))
    with pytest.raises(UserError, match=r"at least 2 training items .* got 1 training item"):
        feature_classifiers.linear((x[:1], y[:1]), none, (x, y), 2, Sweep(), None)
    accuracy = lambda logits, labels: np.mean(logits.argmax(axis=1) == labels)  # noqa: E731
    assert len(feature_classifiers.linear((x[:2], y[:2]), none, (x, y), 2, Sweep((1.0, 10.0)), accuracy)[0]) == 3
    # Where one C is tried there is nothing to choose.
    assert len(feature_classifiers.linear((x[:1], y[:1]), none, (x, y), 2, Sweep((1.0,), 0), None)[0]) == 3


def test_folds_are_even_and_stratified():
    labels = np.repeat([0, 1, 2], [55, 30, 17])
    of = feature_classifiers.folds(labels, 10)
    assert set(np.bincount(of)) == {10, 11}
    for label, count in enumerate([55, 30, 17]):
        inside = np.bincount(of[labels == label], minlength=10)
        assert inside.sum() == count and inside.max() - inside.min() <= 1
    with pytest.raises(UserError, match="at least 10 items for 10 folds; got 9"):
        feature_classifiers.folds(labels[:9], 10)


def test_nested_folds_equal_sklearns():
    """scikit-learn's grid search inside of its cross-validation, on the same folds."""
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    x, y = overlapping(n=99, d=6, k=3, spread=0.4)
    cs = [1e-3, 0.1, 10.0]
    right, extra = feature_classifiers.nested(x, y, 3, cs, 3, 1e-7)
    of, chosen = feature_classifiers.folds(y, 3), []
    for fold in range(3):
        train, test = of != fold, of == fold
        inner = PredefinedSplit(feature_classifiers.folds(y[train], 3))
        search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), {"C": cs}, cv=inner)
        search.fit(x[train].astype(np.float64), y[train])
        chosen.append(np.log10(search.best_params_["C"]))
        assert np.mean((search.predict(x[test]) == y[test]) == right[test]) >= 0.99
    assert extra["log10_c"] == pytest.approx(np.mean(chosen))
