"""Logistic regression against scikit-learn: coefficients, intercepts, probabilities and the choice of C."""

import warnings

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression

from xclip_jax.evaluators import feature_classifiers, logistic
from xclip_jax.evaluators.feature_classifiers import Sweep

CS = (1e-4, 1e-2, 1.0, 100.0)


def features(n, classes, d=12, seed=0, spread=0.5):
    """Overlapping classes on axes of different lengths, away from the origin, as a tower's features are."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = (spread * centres[y] + rng.normal(size=(n, d))) * np.geomspace(2, 0.3, d) + 1
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
        np.testing.assert_allclose(weights, peer.coef_.T, atol=5e-3 * np.abs(peer.coef_).max())
        np.testing.assert_allclose(bias, peer.intercept_, atol=5e-3 * max(1, np.abs(peer.intercept_).max()))
        logits = solution.logits(held)[i]
        np.testing.assert_allclose(scipy.special.softmax(logits, axis=1), peer.predict_proba(held), atol=5e-3)
        assert np.mean(logits.argmax(axis=1) == peer.predict(held)) >= 0.995


@pytest.mark.parametrize("classes", [2, 10])
def test_solution_equals_sklearns(classes):
    x, y = features(500, classes)
    check_against_sklearn(x, y, classes, features(400, classes, seed=1)[0])


@pytest.mark.parametrize("classes", [2, 10])
def test_solution_of_standardised_features_equals_sklearns(classes):
    x, y = features(500, classes)
    mean, std = x.mean(axis=0), x.std(axis=0)
    held = (features(400, classes, seed=1)[0] - mean) / std
    check_against_sklearn((x - mean) / std, y, classes, held)


def test_two_classes_of_three_have_the_penalty_of_two():
    """scikit-learn counts the classes that occur: so does a fold or part of a set that lacks one."""
    x, y = features(300, 2)
    two, three = (logistic.fit(x, y, CS, classes, tolerance=1e-6) for classes in (2, 3))
    np.testing.assert_allclose(two.objective, three.objective, rtol=1e-3)
    difference = [s.weights[..., 1] - s.weights[..., 0] for s in (two, three)]
    np.testing.assert_allclose(*difference, atol=5e-3 * np.abs(difference[0]).max())


def test_objective_of_two_classes_is_sklearns():
    x, y = features(300, 2)
    solution = logistic.fit(x, y, CS, 2, tolerance=1e-6)
    for c, value, peer in zip(CS, solution.objective, (sklearn_fit(x, y, c) for c in CS), strict=True):
        loss = np.logaddexp(0, np.where(y == 1, -1, 1) * peer.decision_function(x)).sum()
        penalty = np.square(peer.coef_).sum() / (2 * c)
        assert value == pytest.approx((loss + penalty) / len(y), rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_chooses_the_c_that_sklearn_would(classes):
    """CLIP's protocol by scikit-learn: each C of a coarse grid on validation, then a fit on both, tested once."""
    train, held, test = (features(n, classes, seed=seed, spread=0.2) for seed, n in enumerate((100, 300, 500)))
    sweep = Sweep(tuple(2.0**e for e in range(-12, 5)), 0, 1e-6)
    right, extra = feature_classifiers.linear(
        train, held, test, classes, sweep, lambda logits, y: -_log_loss(logits, y)
    )
    losses = {c: _log_loss(sklearn_fit(*train, c).predict_log_proba(held[0]), held[1]) for c in sweep.coarse}
    best = min(losses, key=losses.get)
    assert sweep.coarse[0] < best < sweep.coarse[-1]
    assert extra["log10_c"] == pytest.approx(np.log10(best))
    both = (np.concatenate(pair) for pair in zip(train, held, strict=True))
    peer = sklearn_fit(*both, best)
    assert np.mean((peer.predict(test[0]) == test[1]) == right) >= 0.995


def _log_loss(logits, y):
    return -scipy.special.log_softmax(logits, axis=1)[np.arange(len(y)), y].mean()
