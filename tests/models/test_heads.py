import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.helpers.util import jit, random_variables
from xclip_jax.models.heads import Classifier, ClusterHead, Projection
from xclip_jax.parallel.mesh import batch_sharding, make_mesh
from xclip_jax.parallel.sharding import MeshLayout, layout_scope, shardings


def oracle(variables, h, *, layers, train, momentum=0.9, eps=1e-5):
    """(s, running statistics after the call) in float64."""
    params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), (variables["params"], variables["batch_stats"]))
    moved = {}

    def batch_norm(name, x):
        mean, var = stats[name]["mean"], stats[name]["var"]
        moved[name] = {"mean": mean, "var": var}
        if train:
            batch_mean, batch_var = x.mean(axis=0), x.var(axis=0)
            moved[name] = {
                "mean": momentum * mean + (1 - momentum) * batch_mean,
                "var": momentum * var + (1 - momentum) * batch_var,
            }
            mean, var = batch_mean, batch_var
        x = (x - mean) / np.sqrt(var + eps)
        return x * params[name]["scale"] + params[name]["bias"]

    x = h.astype(np.float64)
    for i in range(layers):
        x = batch_norm(f"norm_{i}", x @ params[f"hidden_{i}"]["kernel"])
        x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return x @ params["clusters"]["kernel"] + params["clusters"]["bias"], moved


def test_cluster_head_is_numpys(layers=2, momentum=0.5):
    head = ClusterHead(clusters=7, hidden=10, layers=layers, momentum=momentum)
    h = np.random.default_rng(0).normal(size=(3, 6, 5), loc=0.5).astype(np.float32)
    variables = random_variables(head, h[0])
    assert sorted(variables["batch_stats"]) == [f"norm_{i}" for i in range(layers)]
    oracle_here = functools.partial(oracle, layers=layers, momentum=momentum)

    train = jit(functools.partial(head.apply, train=True, mutable=["batch_stats"]))
    for step in range(2):
        expected, stats = oracle_here(variables, h[step], train=True)
        s, state = train(variables, h[step])
        np.testing.assert_allclose(s, expected, atol=2e-5)
        chex.assert_trees_all_close(state["batch_stats"], stats, atol=1e-5)
        variables = variables | state

    expected, stats = oracle_here(variables, h[2], train=False)
    s, state = jit(functools.partial(head.apply, mutable=["batch_stats"]))(variables, h[2])
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, expected, atol=2e-5)
    chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
    assert np.abs(train(variables, h[2])[0] - s).max() > 1e-2


@pytest.mark.parametrize(("sizes", "clusters_split"), [((8, 1, 1), False), ((2, 2, 2), True)])
def test_batch_statistics_are_global(sizes, clusters_split):
    head = ClusterHead(clusters=8, hidden=12, layers=2)
    rng = np.random.default_rng(0)
    # Every shard has a mean of its own, so that statistics of a shard would show.
    h = (rng.normal(size=(16, 4)) + np.linspace(-3, 3, 16)[:, None]).astype(np.float32)
    weights = rng.normal(size=(16, 8)).astype(np.float32)
    variables = random_variables(head, h)

    def loss(params, h, batch_stats, weights):
        s, state = head.apply({"params": params, "batch_stats": batch_stats}, h, train=True, mutable=["batch_stats"])
        return jnp.sum(weights * s), (s, state)

    def run(mesh):
        layout = MeshLayout(mesh, "fsdp_tp", clusters_split)
        place = shardings(jax.eval_shape(head.init, jax.random.key(0), h), layout)
        by_batch = batch_sharding(mesh)
        args = jax.device_put(
            (variables["params"], h, variables["batch_stats"], weights),
            (place["params"], by_batch, place["batch_stats"], by_batch),
        )
        assert len(args[1].sharding.device_set) == mesh.size
        with layout_scope(layout):
            return jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args)

    one = make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    expected = run(one)
    actual = run(make_mesh(dict(zip(("data", "fsdp", "model"), sizes, strict=True))))
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-4, atol=1e-4)

    shards = h.reshape(sizes[0] * sizes[1], -1, 4)
    local, _ = jax.vmap(lambda x: head.apply(variables, x, train=True, mutable=["batch_stats"]))(shards)
    assert np.abs(local.reshape(16, 8) - expected[0][1][0]).max() > 0.1


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
