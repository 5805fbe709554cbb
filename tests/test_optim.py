import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from tests.helpers.util import assert_close, rows_over
from xclip_jax import optim
from xclip_jax.models.transformer import unstack_blocks
from xclip_jax.train import build

TOWERS = {"img": types.SimpleNamespace(), "txt": types.SimpleNamespace()}


def updated(tx, params, grads, steps=1, jit=False):
    """Parameters after some updates with `grads`, a function of the parameters or one tree for each step."""
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
    for i in range(steps):
        updates, state = update(grads(params) if callable(grads) else grads[i], state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_schedule_warms_up_then_decays(kind):
    config = optim.OptimConfig(lr=1.0, schedule=kind, warmup=10, lr_end=0.2)
    lr = [float(optim.schedule(config, 110)(step)) for step in range(0, 111, 5)]
    np.testing.assert_allclose(lr[:3], [0, 0.5, 1], rtol=1e-6)
    share = np.arange(0, 101, 5) / 100
    expected = {"cosine": 0.2 + 0.4 * (1 + np.cos(np.pi * share)), "linear": 1 - 0.8 * share, "constant": 0 * share + 1}
    np.testing.assert_allclose(lr[2:], expected[kind], rtol=1e-5)
    assert float(optim.schedule(optim.OptimConfig(lr=1.0, schedule=kind), 110)(0)) == 1


def test_decay_reaches_kernels_and_tables_of_a_model():
    p, found = build.build(tiny.config("xclip", model__img__pool="map"), jax.devices()[:1]), {}
    params = p.abstract.params | {"other": {"embedding": jnp.ones((3, 2))}}  # flax's, of towers of others
    for path, decays in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params)):
        found.setdefault(path[-1].key, set()).add(decays)
    tables = ("kernel", "positions", "tokens", "probe", "embedding")
    assert found == {name: {name in tables} for name in (*tables, "bias", "scale", "log_scale")}


def test_adamw_against_its_formula():
    config = optim.OptimConfig(lr=0.01, schedule="constant", weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-3)
    rng = np.random.default_rng(0)
    w, *grads = rng.normal(size=(6, 3, 2))
    params = {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(2)}
    steps = [{"kernel": jnp.asarray(grad, jnp.float32), "bias": jnp.zeros(2)} for grad in grads]
    found = updated(optim.make_optimizer(config, 10, {}), params, steps, 5)
    mu = nu = np.zeros((3, 2))
    for t, grad in enumerate(grads, 1):
        mu, nu = 0.8 * mu + 0.2 * grad, 0.9 * nu + 0.1 * grad**2
        w = w - 0.01 * ((mu / (1 - 0.8**t)) / (np.sqrt(nu / (1 - 0.9**t)) + 1e-3) + 0.1 * w)
    np.testing.assert_allclose(found["kernel"], w, rtol=1e-5)
    np.testing.assert_array_equal(found["bias"], 1)  # no decay


def test_clip_bounds_the_global_norm():
    config = optim.OptimConfig(lr=1.0, schedule="constant", grad_clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6)
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    grads = {"kernel": jnp.full((2, 2), 30.0), "bias": jnp.full(2, 40.0)}
    updates = updated(optim.make_optimizer(config, 10, {}), params, [grads])
    # An enormous eps makes AdamW linear in the gradient.
    np.testing.assert_allclose(float(optax.tree.norm(updates)) * 1e6, 1.0, rtol=1e-4)


def test_ema_momentum():
    values = [float(optim.ema_momentum(step, 100, 0.996)) for step in (0, 50, 100, 150)]
    np.testing.assert_allclose(values, [0.996, 0.998, 1.0, 1.0], rtol=1e-6)


def test_muon_equals_optax():
    """Ten steps on 8 devices against optax's own on one; the kernel of a block is a matrix, the rest has AdamW."""
    rng = np.random.default_rng(0)
    sizes = {"mlp": {"kernel": (24, 40), "bias": (40,)}, "norm_1": {"scale": (24,)}}
    tree = {"img": {"transformer": {"block_0": sizes}, "patches": {"kernel": (48, 24)}}, "proj": {"kernel": (24, 8)}}
    params = jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), tree, is_leaf=lambda x: type(x) is tuple)
    labels = jax.tree.map(lambda x: "adam", params)
    labels["img"]["transformer"]["block_0"]["mlp"]["kernel"] = "muon"
    config = optim.OptimConfig("muon", lr=0.02, lr_end=0.001, warmup=4, weight_decay=0.3, b1=0.8, b2=0.97, eps=1e-5)
    rate = optim.schedule(config, 10)
    muon = optax.contrib.muon(rate, beta=0.8, eps=1e-5, consistent_rms=0.2, weight_decay=0.3)
    adam = optax.adamw(rate, b1=0.8, b2=0.97, eps=1e-5, weight_decay=0.3, mask=optim.decay_mask)
    gradient = lambda params: jax.tree.map(lambda x: jnp.sin(3 * x), params)  # noqa: E731
    expected = updated(optax.partition({"muon": muon, "adam": adam}, labels), params, gradient, 10, jit=True)
    ours = optim.make_optimizer(config, 10, TOWERS)
    found = updated(ours, jax.device_put(params, rows_over(8)), gradient, 10, jit=True)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-4)
    assert all(jnp.abs(x - y).max() > 0.01 for x, y in zip(*map(jax.tree.leaves, (expected, params)), strict=True))


def test_stacked_blocks_are_updated_as_unrolled_ones():
    """Over two steps of Muon in which gradients grow, in the second block the most."""
    tx = optim.make_optimizer(optim.OptimConfig("muon", lr=0.1, schedule="constant", weight_decay=0.2), 9, TOWERS)
    rng = np.random.default_rng(0)
    growth = np.array([1.0, 5.0], np.float32)
    steps = [
        {"kernel": rng.normal(size=(2, 13, 16)) * growth[:, None, None] ** i,
         "bias": rng.normal(size=(2, 16)) * growth[:, None] ** i}
        for i in range(3)
    ]  # fmt: skip
    trees = [{"blocks": {"mlp": jax.tree.map(jnp.float32, tree)}} for tree in steps]
    ends = []
    for form in (trees, [unstack_blocks(tree, 2) for tree in trees]):
        params, *grads = [{"img": {"transformer": tree}} for tree in form]
        ends.append(updated(tx, params, grads, 2)["img"]["transformer"])
    assert_close(jax.tree.leaves(unstack_blocks(ends[0], 2)), jax.tree.leaves(ends[1]), 1e-5)


def test_muon_takes_each_matrix_of_a_kernel_by_itself():
    """Updates of queries, keys, values and of stacked blocks have singular values near 1 before scaling."""
    shapes = {"qkv": (2, 16, 3, 2, 8), "out": (2, 2, 8, 16)}
    rng = np.random.default_rng(0)
    kernels = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}
    params = {"img": {"transformer": {"blocks": {"attention": kernels}}}, "txt": {"tokens": jnp.ones((5, 4))}}
    tx = optim.make_optimizer(optim.OptimConfig("muon", lr=1.0, schedule="constant", weight_decay=0), 9, TOWERS)
    updates, _ = tx.update(params, tx.init(params), params)
    attention = updates["img"]["transformer"]["blocks"]["attention"]
    matrices = np.moveaxis(attention["qkv"]["kernel"], 2, 1).reshape(6, 16, 16)
    outputs = attention["out"]["kernel"].reshape(2, 16, 16)
    for x in (*matrices, *outputs):
        values = np.linalg.svd(x, compute_uv=False) / (0.2 * max(x.shape) ** 0.5)
        assert np.median(values) > 0.6 and values.max() < 1.3
    assert np.abs(updates["txt"]["tokens"]).max() == pytest.approx(1, rel=1e-3)  # AdamW's first step
