"""Logistic regression against scikit-learn: coefficients, intercepts, and probabilities."""

import warnings

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression

from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import logistic

CS = (1e-4, 1e-2, 1.0, 100.0)


def features(n, classes, d=12, seed=0, spread=0.5, longest=2):
    """Overlapping classes on axes of different lengths, away from the origin, as a tower's features are."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = (spread * centres[y] + rng.normal(size=(n, d))) * np.geomspace(longest, 0.3, d) + 1
    return x.astype(np.float32), y


def sklearn_fit(x, y, c):
    """The optimum in float64, rather than where scikit-learn's default tolerance stops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line search ends at float64's precision
        return LogisticRegression(C=c, max_iter=20_000, tol=1e-9).fit(x.astype(np.float64), y)


def check_against_sklearn(x, y, classes, held):
    solution = logistic.fit(x, y, CS, classes, tolerance=1e-6)
    for i, c in enumerate(CS):
        peer = sklearn_fit(x, y, c)
        weights, bias = solution.weights[i].astype(np.float64), solution.bias[i].astype(np.float64)
        if classes == 2:  # scikit-learn has the second class's logit less the first's
            weights, bias = (weights[:, 1] - weights[:, 0])[:, None], bias[1:] - bias[:1]
            loss = np.logaddexp(0, np.where(y == 1, -1, 1) * peer.decision_function(x)).sum()
            objective = (loss + np.square(peer.coef_).sum() / (2 * c)) / len(y)
            assert solution.objective[i] == pytest.approx(objective, rel=1e-3)
        np.testing.assert_allclose(weights, peer.coef_.T, atol=5e-3 * np.abs(peer.coef_).max())
        np.testing.assert_allclose(bias, peer.intercept_, atol=5e-3 * max(1, np.abs(peer.intercept_).max()))
        logits = solution.logits(held)[i]
        np.testing.assert_allclose(scipy.special.softmax(logits, axis=1), peer.predict_proba(held), atol=5e-3)
        assert np.mean(logits.argmax(axis=1) == peer.predict(held)) >= 0.995


@pytest.mark.parametrize("classes", [2, 5])
def test_solution_equals_sklearns(classes):
    x, y = features(300, classes)
    check_against_sklearn(x, y, classes, features(200, classes, seed=1)[0])


def test_two_classes_of_three_have_the_penalty_of_two():
    """scikit-learn counts the classes that occur: so does a fold or part of a set that lacks one."""
    x, y = features(300, 2)
    two, three = (logistic.fit(x, y, CS, classes, tolerance=1e-6) for classes in (2, 3))
    np.testing.assert_allclose(two.objective, three.objective, rtol=1e-3)
    difference = [s.weights[..., 1] - s.weights[..., 0] for s in (two, three)]
    np.testing.assert_allclose(*difference, atol=5e-3 * np.abs(difference[0]).max())


def overlapping(n=600, d=24, k=7, spread=0.6, seed=0):
    return features(n, k, d, seed, spread, longest=3)


def test_it_stops_at_a_small_gradient():
    x, y = overlapping()
    x = x + 3  # where the gradient of centred features is another one
    cs = [1e-2, 1.0, 1e2]
    rough, fine = (logistic.fit(x, y, cs, 7, tolerance=tolerance) for tolerance in (1e-3, 1e-5))
    for solution, tolerance in ((rough, 1e-3), (fine, 1e-5)):
        for c, weights, bias in zip(cs, solution.weights, solution.bias, strict=True):
            wrong = scipy.special.softmax(x @ weights + bias, axis=1) - np.eye(7)[y]
            slopes = np.abs(x.T @ wrong / len(y) + weights / (c * len(y)))
            assert max(slopes.max(), np.abs(wrong.mean(axis=0)).max()) <= 1.1 * tolerance


def test_each_c_is_solved_as_if_alone(monkeypatch):
    x, y = overlapping(n=150, d=8)
    cs = [1e-2, 1.0, 1e3]
    together = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    monkeypatch.setattr(logistic, "_SMALL", 0)  # converged problems are dropped
    dropped = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    monkeypatch.setattr(logistic, "_SCORES", 2 * 150 * 7)  # in turns
    turns = logistic.fit(x, y, cs, 7, tolerance=1e-7)
    for i, c in enumerate(cs):
        alone = logistic.fit(x, y, [c], 7, tolerance=1e-7)
        for other in (together, dropped, turns):
            assert other.objective[i] == pytest.approx(alone.objective[0], rel=1e-4)


def test_constant_features_absent_and_separable_classes():
    x, y = overlapping(n=200, d=5)
    x[:, 2] = 3
    solution = logistic.fit(x, y, [1.0, 1e6], 9)  # classes 7 and 8 do not occur
    assert np.isfinite(solution.weights).all() and np.isfinite(solution.bias).all()
    assert solution.logits(x).argmax(axis=2).max() <= 6
    y = np.arange(40) % 4
    assert np.isfinite(logistic.fit(np.eye(4)[y], y, [1.0, 1e6], 4).objective).all()


def test_features_are_rotated_in_blocks(monkeypatch):
    x = np.random.default_rng(0).standard_normal((100, 8), np.float32) + 5
    whole = [np.asarray(part) for part in logistic._rotate(x)]
    monkeypatch.setattr(logistic, "_BLOCK", 8 * 30)
    rotated, mean, spectrum, axes = (np.asarray(part) for part in logistic._rotate(x))
    np.testing.assert_allclose(spectrum, whole[2], rtol=1e-4)
    np.testing.assert_allclose(rotated[:, :-1] @ axes.T + mean, x, atol=1e-4)
    assert (rotated[:, -1] == 1).all()


def test_features_of_a_model_that_diverged():
    with pytest.raises(UserError, match="not finite"):
        logistic.fit(np.full((3, 2), np.nan), np.array([0, 1, 0]), [1.0], 2)
