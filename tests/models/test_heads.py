import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from tests.helpers.util import jit, random_variables
from xclip_jax.models.heads import Classifier, ClusterHead, Projection


def oracle(variables, h, *, train, layers=2, momentum=0.5, eps=1e-5):
    """(s, running statistics after the call) in float64."""
    params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), (variables["params"], variables["batch_stats"]))
    moved = {}

    def batch_norm(name, x):
        mean, var = stats[name]["mean"], stats[name]["var"]
        moved[name] = {"mean": mean, "var": var}
        if train:
            batch_mean, batch_var = x.mean(axis=0), x.var(axis=0)
            moved[name]["mean"] = momentum * mean + (1 - momentum) * batch_mean
            moved[name]["var"] = momentum * var + (1 - momentum) * batch_var
            mean, var = batch_mean, batch_var
        x = (x - mean) / np.sqrt(var + eps)
        return x * params[name]["scale"] + params[name]["bias"]

    x = h.astype(np.float64)
    for i in range(layers):
        x = batch_norm(f"norm_{i}", x @ params[f"hidden_{i}"]["kernel"])
        x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return x @ params["clusters"]["kernel"] + params["clusters"]["bias"], moved


def test_cluster_head_is_numpys():
    head = ClusterHead(clusters=7, hidden=10, layers=2, momentum=0.5)
    h = np.random.default_rng(0).normal(size=(3, 6, 5), loc=0.5).astype(np.float32)
    variables = random_variables(head, h[0])
    train = jit(functools.partial(head.apply, train=True, mutable=["batch_stats"]))
    for step in range(2):
        expected, stats = oracle(variables, h[step], train=True)
        s, state = train(variables, h[step])
        np.testing.assert_allclose(s, expected, atol=2e-5)
        chex.assert_trees_all_close(state["batch_stats"], stats, atol=1e-5)
        variables = variables | state

    expected, _ = oracle(variables, h[2], train=False)
    s, state = jit(functools.partial(head.apply, mutable=["batch_stats"]))(variables, h[2])
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, expected, atol=2e-5)
    chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
    assert np.abs(train(variables, h[2])[0] - s).max() > 1e-2


def test_classifier_of_bfloat16_features_computes_in_fp32():
    """A label that is a number, say 3.7 with a bias near it, is not rounded to 8 bits."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)), jnp.bfloat16)
    classifier = Classifier(1, std=0.1)
    params = {"linear": random_variables(classifier, h)["params"]["linear"] | {"bias": jnp.array([3.7])}}
    y = classifier.apply({"params": params}, h)
    assert y.dtype == jnp.float32
    exact = np.asarray(h, np.float64) @ np.asarray(params["linear"]["kernel"], np.float64) + np.float32(3.7)
    np.testing.assert_allclose(y, exact, rtol=1e-5)


def test_projection_rows_have_unit_norm():
    h = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32) * np.logspace(-6, 6, 5)[:, None]
    projection = Projection(4)
    variables = random_variables(projection, h)
    z = projection.apply(variables, h)
    chex.assert_shape(z, (5, 4))
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)
    expected = h @ variables["params"]["linear"]["kernel"]
    np.testing.assert_allclose(z, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert list(variables["params"]["linear"]) == ["kernel"]  # CLIP's projection has no bias
    z = Projection(4, jnp.bfloat16).apply(variables, h)
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-6)


def test_zero_row_stays_zero_with_a_finite_gradient():
    h = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    h[1] = 0
    projection = Projection(4)
    variables = random_variables(projection, h)
    z = projection.apply(variables, h)
    np.testing.assert_array_equal(z[1], np.zeros(4))
    gradients = jax.grad(lambda v, h: jnp.sum(jnp.arange(4) * projection.apply(v, h)), argnums=(0, 1))(variables, h)
    chex.assert_tree_all_finite(gradients)
    # A row of zeros adds nothing to the kernel's gradient.
    rest = jax.grad(lambda v: jnp.sum(jnp.arange(4) * projection.apply(v, h[::2])))(variables)
    chex.assert_trees_all_close(gradients[0], rest, rtol=1e-5)
