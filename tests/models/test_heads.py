"""Heads: the cluster head against NumPy and against itself on eight devices, projections, and what is left out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import erf

from tests.helpers.util import jit, random_variables, two_towers
from xclip_jax.losses.logits import FactoredLogits
from xclip_jax.models.heads import Classifier, ClusterHead, Projection, l2_normalize
from xclip_jax.parallel.mesh import batch_sharding, make_mesh
from xclip_jax.parallel.sharding import MeshLayout, layout_scope, shardings

every_head = pytest.mark.parametrize(
    ("layers", "last_norm"), [(1, False), (2, False), (1, True), (2, True)], ids=["1", "2", "1+norm", "2+norm"]
)


# --- cluster head


def oracle(variables, h, *, layers, last_norm, train, momentum=0.9, eps=1e-5):
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
        return x if name == "norm_last" else x * params[name]["scale"] + params[name]["bias"]

    x = h.astype(np.float64)
    for i in range(layers):
        x = batch_norm(f"norm_{i}", x @ params[f"hidden_{i}"]["kernel"])
        x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    s = x @ params["clusters"]["kernel"] + params["clusters"]["bias"]
    return batch_norm("norm_last", s) if last_norm else s, moved


@every_head
def test_cluster_head_is_numpys(layers, last_norm):
    head = ClusterHead(clusters=7, hidden=10, layers=layers, last_norm=last_norm)
    h = np.random.default_rng(0).normal(size=(3, 6, 5), loc=0.5).astype(np.float32)
    variables = random_variables(head, h[0])
    names = [f"norm_{i}" for i in range(layers)] + ["norm_last"] * last_norm
    assert sorted(variables["batch_stats"]) == sorted(names)
    assert "norm_last" not in variables["params"]
    oracle_here = functools.partial(oracle, layers=layers, last_norm=last_norm)

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


def test_cluster_head_momentum():
    head = ClusterHead(clusters=7, hidden=10, momentum=0.5)
    h = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    variables = random_variables(head, h)
    _, state = head.apply(variables, h, train=True, mutable=["batch_stats"])
    _, stats = oracle(variables, h, layers=1, last_norm=False, train=True, momentum=0.5)
    chex.assert_trees_all_close(state["batch_stats"], stats, atol=1e-5)


def factors(dtype):
    """x in `dtype`, kernel, bias, and weights of the logits in a loss; around 3, so that sums are large."""
    rng = np.random.default_rng(0)
    x, kernel, bias, weights = (rng.normal(size=size, loc=3) for size in ((32, 48), (48, 20), (20,), (32, 20)))
    return jnp.asarray(x, dtype), *(jnp.asarray(y, jnp.float32) for y in (kernel / 7, bias, weights))


def test_cluster_logits_of_bfloat16_are_fp32():
    """Sums and bias are not rounded to the 8 bits of their factors, nor is the gradient of the bias."""
    x, kernel, bias, weights = factors(jnp.bfloat16)

    def loss(x, kernel, bias):
        s = FactoredLogits(x, kernel, bias).logits()
        return jnp.sum(weights * s), s

    grads, s = jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, kernel, bias)
    x, bias, weights = (np.asarray(y, np.float64) for y in (x, bias, weights))
    kernel = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, x @ kernel + bias, rtol=1e-5)
    assert [y.dtype for y in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    # The two products of gradients are in bf16, as those of all other layers.
    expected = weights @ kernel.T, x.T @ weights
    for found, exact in zip(grads[:2], expected, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-7)
    np.testing.assert_allclose(grads[2], weights.sum(axis=0), rtol=1e-5)


def test_cluster_logits_of_fp32_are_plain_products():
    """Equal bit by bit."""
    *operands, weights = factors(jnp.float32)

    def with_gradients(fn):
        return jit(jax.value_and_grad(lambda *args: jnp.sum(weights * fn(*args)), argnums=(0, 1, 2)))(*operands)

    plain = with_gradients(lambda x, kernel, bias: jnp.matmul(x, kernel) + bias)
    chex.assert_trees_all_equal(with_gradients(lambda *args: FactoredLogits(*args).logits()), plain)


@pytest.mark.parametrize("clusters_split", [False, True], ids=["", "clusters split"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=["data", "data+fsdp+model"])
def test_batch_statistics_are_global(sizes, clusters_split):
    head = ClusterHead(clusters=8, hidden=12, layers=2, last_norm=True)
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


# --- classifier


def test_classifier_of_bfloat16_features_computes_in_fp32():
    """A label that is a number, say 3.7 with a bias near it, is not rounded to 8 bits."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)), jnp.bfloat16)
    classifier = Classifier(1, std=0.1)
    params = {"linear": random_variables(classifier, h)["params"]["linear"] | {"bias": jnp.array([3.7])}}
    y = classifier.apply({"params": params}, h)
    assert y.dtype == jnp.float32
    exact = np.asarray(h, np.float64) @ np.asarray(params["linear"]["kernel"], np.float64) + np.float32(3.7)
    np.testing.assert_allclose(y, exact, rtol=1e-5)


# --- projection


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


def test_l2_normalize_works_in_fp32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 50)), jnp.bfloat16)
    z = l2_normalize(x)
    assert z.dtype == jnp.float32
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(z, x / np.linalg.norm(x, axis=-1, keepdims=True), atol=1e-6)


# --- two towers

SIZES = {
    "img": {"image_size": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2},
    "txt": {"vocab": 9, "eot_id": 8, "context_length": 4, "width": 12, "depth": 1, "heads": 2},
    "embed": 6,
}
IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
TEXT = np.array([[1, 2, 8, 0], [3, 4, 5, 8]])
HEAD = {"clusters": 5, "hidden": 7}
CLIP = {"z_img", "z_txt", "scale"}
CLUSTERS = {"s_img", "s_txt"}


@pytest.mark.parametrize(
    ("fields", "outputs", "params", "statistics"),
    [
        ({}, CLIP, {"proj_img", "proj_txt", "log_scale"}, False),
        ({"bias_init": -10.0}, CLIP | {"bias"}, {"proj_img", "proj_txt", "log_scale", "bias"}, False),
        ({"embed": 0, "cluster_head": HEAD}, CLUSTERS, {"clusters_img", "clusters_txt"}, True),
        ({"embed": 0, "bias_init": -10.0}, set(), set(), False),
        (
            {"cluster_head": HEAD},
            CLIP | CLUSTERS,
            {"proj_img", "proj_txt", "log_scale", "clusters_img", "clusters_txt"},
            True,
        ),
    ],
    ids=["clip", "siglip", "nclip", "towers", "xclip"],
)
def test_two_towers_have_what_is_asked_for(fields, outputs, params, statistics):
    model = two_towers(**SIZES | fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)
    assert set(variables["params"]) == {"img", "txt"} | params
    assert ("batch_stats" in variables) == statistics
    out = jax.eval_shape(model.apply, nn.unbox(variables), IMAGE, TEXT)
    assert set(out) == {"h_img", "h_txt"} | outputs
    sizes = {"h_img": (2, 8), "h_txt": (2, 12), "scale": (), "bias": ()}
    for name, x in out.items():
        assert x.shape == sizes.get(name, (2, 6) if name.startswith("z") else (2, 5)), name
        assert x.dtype == jnp.float32, name


def test_two_towers_scale_and_bias_start_where_told():
    model = two_towers(**SIZES, scale_init=10.0, bias_init=-10.0)

    @jit  # compiles what it returns and no more
    def run():
        variables = nn.unbox(model.init(jax.random.key(0), IMAGE, TEXT))
        return model.apply(variables, None, None, method="project")

    out = run()
    assert set(out) == {"scale", "bias"}
    np.testing.assert_allclose([out["scale"], out["bias"]], [10, -10], rtol=1e-6)


@pytest.mark.parametrize(("kind", "batch"), [("img", IMAGE), ("txt", TEXT)])
def test_one_modality_alone_gives_the_same(kind, batch):
    model = two_towers(**SIZES, cluster_head=HEAD)
    variables = random_variables(model, IMAGE, TEXT)
    everything = jit(model.apply)(variables, IMAGE, TEXT)

    @jit
    def alone(variables):
        h = model.apply(variables, batch, method={"img": "encode_image", "txt": "encode_text"}[kind])
        pair = (h, None) if kind == "img" else (None, h)
        return {f"h_{kind}": h} | model.apply(variables, *pair, method="project")

    out = alone(variables)
    assert set(out) == {f"h_{kind}", f"z_{kind}", f"s_{kind}", "scale"}
    chex.assert_trees_all_close(out, {name: everything[name] for name in out}, atol=1e-6)


def test_clusters_train_with_the_statistics_of_the_batch():
    model = two_towers(**SIZES, cluster_head=HEAD)
    variables = random_variables(model, IMAGE, TEXT)
    out, state = jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, IMAGE, TEXT)
    for kind in ("img", "txt"):
        head = {c: variables[c][f"clusters_{kind}"] for c in ("params", "batch_stats")}
        s, stats = oracle(head, np.asarray(out[f"h_{kind}"]), layers=1, last_norm=False, train=True)
        np.testing.assert_allclose(out[f"s_{kind}"], s, atol=1e-3)
        chex.assert_trees_all_close(state["batch_stats"][f"clusters_{kind}"], stats, atol=1e-5)
