import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from xclip_jax import optim
from xclip_jax.models.transformer import unstack_blocks
from xclip_jax.train import build


@pytest.mark.parametrize("kind", optim.SCHEDULES)
def test_schedule_warms_up_then_decays(kind):
    config = optim.OptimConfig(lr=1.0, schedule=kind, warmup=10, lr_end=0.2)
    lr = [float(optim.schedule(config, 110)(step)) for step in range(111)]
    np.testing.assert_allclose(lr[:11], np.arange(11) / 10, rtol=1e-6)
    share = np.arange(101) / 100
    expected = {
        "cosine": 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * share)),
        "linear": 1 - 0.8 * share,
        "constant": np.ones(101),
    }[kind]
    np.testing.assert_allclose(lr[10:], expected, rtol=1e-5)


def test_decay_reaches_kernels_alone():
    params = {
        "img": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "positions": jnp.ones((4, 2))},
        "stack": {"norm": {"scale": jnp.ones((12, 3)), "bias": jnp.ones((12, 3))}},
        "cls": jnp.ones(2),
        "log_scale": jnp.ones(()),
        "table": {"embedding": jnp.ones((3, 2))},  # flax's, of towers of others
    }
    mask = optim.decay_mask(params)
    assert mask == {
        "img": {"dense": {"kernel": True, "bias": False}, "positions": True},
        "stack": {"norm": {"scale": False, "bias": False}},
        "cls": False,
        "log_scale": False,
        "table": {"embedding": True},
    }
    tx = optim.make_optimizer(optim.OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5), 10, {})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    # With no gradient an update is decay alone: -lr * weight_decay * parameter.
    chex.assert_trees_all_close(updates, jax.tree.map(lambda m, p: -0.05 * m * p, mask, params))


def test_decay_of_all_parameters_of_a_model():
    p, found = build.build(tiny.config("xclip", model__img__pool="map"), jax.devices()[:1]), {}
    for path, decays in jax.tree_util.tree_leaves_with_path(optim.decay_mask(p.abstract.params)):
        found.setdefault(path[-1].key, set()).add(decays)
    tables = ("kernel", "positions", "tokens", "probe")
    assert found == {name: {name in tables} for name in (*tables, "bias", "scale", "log_scale")}


def test_adamw_against_its_formula():
    config = optim.OptimConfig(lr=0.01, schedule="constant", weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-3)
    tx, rng = optim.make_optimizer(config, 10, {}), np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    state, w = tx.init(params), np.asarray(params["kernel"], np.float64)
    mu = nu = np.zeros((3, 2))
    for t in range(1, 6):
        grad = rng.normal(size=(3, 2))
        updates, state = tx.update({"kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        mu, nu = 0.8 * mu + 0.2 * grad, 0.9 * nu + 0.1 * grad**2
        w = w - 0.01 * ((mu / (1 - 0.8**t)) / (np.sqrt(nu / (1 - 0.9**t)) + 1e-3) + 0.1 * w)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


def test_clip_bounds_the_global_norm():
    tx = optim.make_optimizer(
        optim.OptimConfig(lr=1.0, schedule="constant", grad_clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6), 10, {}
    )
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    grads = {"kernel": jnp.full((2, 2), 30.0), "bias": jnp.full(2, 40.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    # An enormous eps makes AdamW linear in the gradient.
    np.testing.assert_allclose(float(optax.tree.norm(updates)) * 1e6, 1.0, rtol=1e-4)


def test_ema_momentum():
    values = [float(optim.ema_momentum(step, 100, 0.996)) for step in (0, 50, 100)]
    np.testing.assert_allclose(values, [0.996, 0.998, 1.0], rtol=1e-6)


# --- optimizers by name


def reference(name, config, rate, labels):
    """The update rule as optax's own alias, of parameters that are matrices or vectors; weight decay is added apart."""
    adam = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "weight_decay": config.weight_decay}
    mask = {"mask": optim.decay_mask}
    if name == "muon":
        muon = optax.contrib.muon(rate, beta=config.b1, eps=config.eps, consistent_rms=0.2)
        muon = optax.chain(muon, decay_of(rate, config.weight_decay))
        return optax.partition({"muon": muon, "adam": optax.adamw(rate, **adam, **mask)}, labels)
    if name == "adafactor":
        adafactor = optax.adafactor(rate, multiply_by_parameter_scale=False, momentum=config.b1)
        return optax.chain(adafactor, decay_of(rate, config.weight_decay))
    if name == "lion":
        return optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, **mask)
    return {"adamw": optax.adamw, "lamb": optax.lamb}[name](rate, **adam, **mask)


def decay_of(rate, decay):
    """Decoupled weight decay as a transformation after the learning rate."""

    def update(updates, step, params):
        scale = -rate(step) * decay
        decayed = jax.tree.map(lambda u, p, on: u + scale * p * on, updates, params, optim.decay_mask(params))
        return decayed, step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def split(tree, strategy):
    """Large arrays over 8 devices as `strategy` has them: rows of all arrays, or of none."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data" if strategy == "split" else None)
    return jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)), tree)


@pytest.mark.parametrize("strategy", ["split", "whole"])
@pytest.mark.parametrize("name", optim.NAMES)
def test_optimizers_equal_optax(name, strategy):
    """20 steps on 8 devices against optax's own on one, with kernels that Muon takes as matrices."""
    rng = np.random.default_rng(0)
    sizes = {"mlp": {"kernel": (136, 160), "bias": (160,)}, "norm_1": {"scale": (136,)}}
    tree = {"img": {"transformer": {"block_0": sizes}, "patches": {"kernel": (48, 136)}}, "proj": {"kernel": (136, 8)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), tree, is_leaf=lambda x: type(x) is tuple
    )
    towers = {"img": build.build(tiny.config()).model.img}
    labels = jax.tree.map(lambda x: "adam", params)
    labels["img"]["transformer"]["block_0"]["mlp"]["kernel"] = "muon"
    config = optim.OptimConfig(name=name, lr=0.02, lr_end=0.001, warmup=4, weight_decay=0.3, b1=0.8, b2=0.97, eps=1e-5)
    rate = optim.schedule(config, 20)
    ours, theirs = optim.make_optimizer(config, 20, towers), reference(name, config, rate, labels)
    ends = []
    for tx, p in ((theirs, params), (ours, split(params, strategy))):
        state, update = tx.init(p), jax.jit(tx.update)
        for _ in range(20):
            grads = jax.tree.map(lambda x: jnp.sin(3 * x), p)
            updates, state = update(grads, state, p)
            p = optax.apply_updates(p, updates)
        ends.append(p)
    chex.assert_trees_all_close(*ends, rtol=1e-3, atol=1e-4)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ends[0], params))) > 0.1


@pytest.mark.parametrize("name", [name for name in optim.NAMES if name != "lamb"])
def test_stacked_blocks_are_updated_as_unrolled_ones(name):
    """Over three steps in which gradients grow, in the second block the most."""
    config = optim.OptimConfig(name=name, lr=0.1, schedule="constant", weight_decay=0.2, b1=0.5)
    tx = optim.make_optimizer(config, 9, {"img": build.build(tiny.config()).model.img})
    rng = np.random.default_rng(0)
    growth = np.array([1.0, 5.0], np.float32)
    steps = [
        {"kernel": rng.normal(size=(2, 130, 160)) * growth[:, None, None] ** i,
         "bias": rng.normal(size=(2, 160)) * growth[:, None] ** i}
        for i in range(4)
    ]  # fmt: skip
    ends = []
    for stacked in (True, False):
        trees = [{"blocks": {"mlp": jax.tree.map(jnp.float32, tree)}} for tree in steps]
        trees = trees if stacked else [unstack_blocks(tree, 2) for tree in trees]
        params, *grads = [{"img": {"transformer": tree}} for tree in trees]
        state = tx.init(params)
        for grad in grads:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        blocks = params["img"]["transformer"]
        ends.append(unstack_blocks(blocks, 2) if stacked else blocks)
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


def test_muon_takes_each_matrix_of_a_kernel_by_itself():
    """Updates of queries, keys, values and of stacked blocks have singular values near 1 before scaling."""
    scanned = build.build(tiny.config(model__img__scan=True, model__img__depth=2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), scanned.abstract.params)
    towers = {name: getattr(scanned.model, name) for name in ("img", "txt")}
    tx = optim.make_optimizer(optim.OptimConfig(name="muon", lr=1.0, schedule="constant", weight_decay=0), 9, towers)
    updates, _ = tx.update(params, tx.init(params), params)
    attention = updates["img"]["transformer"]["blocks"]["attention"]
    depth, d, _, heads, size = attention["qkv"]["kernel"].shape
    matrices = np.moveaxis(attention["qkv"]["kernel"], 2, 1).reshape(depth * 3, d, heads * size)
    outputs = attention["out"]["kernel"].reshape(depth, heads * size, d)
    for x in (*matrices, *outputs):
        values = np.linalg.svd(x, compute_uv=False) / (0.2 * max(x.shape) ** 0.5)
        assert np.median(values) > 0.6 and values.max() < 1.3
    assert np.abs(updates["txt"]["tokens"]).max() == pytest.approx(1, rel=1e-3)  # AdamW's first step
