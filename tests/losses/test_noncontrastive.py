"""nCLIP's loss against a float64 oracle, closed forms and eight devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers.util import assert_close, central_differences
from xclip_jax.losses.noncontrastive import BALANCES, TARGETS, effective_rank, nclip, sinkhorn

# tau, sharpness, smoothness: each alone, then all together, and the defaults.
SETTINGS = [
    (1.0, 0.0, 0.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
    (0.5, 1.0, 2.0),
    (0.3, 0.7, 1.5),
    (1.0, 1.0, 2.0),
]

every_option = pytest.mark.parametrize(("target", "balance"), list(itertools.product(TARGETS, BALANCES)))


def case(target, balance, b=6, k=5, seed=0, size=1.5):
    """Random float64 logits and the arrays that the options need."""
    rng = np.random.default_rng(seed)
    s_img, s_txt, t_img, t_txt = size * rng.normal(size=(4, b, k))
    extra = {}
    if target == "ema":
        extra |= {"teacher_img": t_img, "teacher_txt": t_txt}
    return s_img, s_txt, extra


def oracle_softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(axis=-1)


def oracle_targets(s_img, s_txt, extra, balance, tau):
    targets = []
    for name, s in (("img", s_img), ("txt", s_txt)):
        x = extra.get(f"teacher_{name}", s) / tau
        if balance != "sinkhorn":
            targets.append(oracle_softmax(x))
            continue
        b, k = x.shape
        a = np.exp(x - x.max())
        for _ in range(3):
            a *= (b / k) / a.sum(axis=0, keepdims=True)
            a /= a.sum(axis=1, keepdims=True)
        targets.append(a)
    return targets


def oracle_loss(s_img, s_txt, targets, tau, sharpness, smoothness):
    p, q = oracle_softmax(s_img / tau), oracle_softmax(s_txt / tau)
    p_hat, q_hat = targets
    align = -0.5 * np.mean((p_hat * np.log(q)).sum(axis=1) + (q_hat * np.log(p)).sum(axis=1))
    sharp = 0.5 * (entropy(p).mean() + entropy(q).mean())
    smooth = 0.5 * (entropy(p.mean(axis=0)) + entropy(q.mean(axis=0)))
    return align + sharpness * sharp - smoothness * smooth


@functools.cache
def compiled(target, balance):
    """Value, metrics and gradients by both logits; the weights and temperatures are traced."""

    def f(s_img, s_txt, options):
        return nclip(s_img, s_txt, target=target, balance=balance, **options)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


def run(s_img, s_txt, target="detach", balance="none", sharding=None, **options):
    # One structure of options, and few shapes, keep compilations few.
    options = {"tau": 1.0, "sharpness": 1.0, "smoothness": 2.0} | options
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (s_img, s_txt, options))
    if sharding is not None:
        by_row = lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x  # noqa: E731
        arrays = jax.tree.map(by_row, arrays)
        assert len(arrays[0].sharding.device_set) == 8
    (loss, metrics), grads = compiled(target, balance)(*arrays)
    return float(loss), {key: float(value) for key, value in metrics.items()}, grads


@pytest.mark.parametrize("setting", SETTINGS)
@every_option
def test_equals_oracle(target, balance, setting):
    tau, sharpness, smoothness = setting
    s_img, s_txt, extra = case(target, balance)
    targets_of = functools.partial(oracle_targets, extra=extra, balance=balance, tau=tau)
    frozen = targets_of(s_img, s_txt)

    def f(a, b):
        targets = targets_of(a, b) if target == "joint" else frozen
        return oracle_loss(a, b, targets, tau, sharpness, smoothness)

    options = {"tau": tau, "sharpness": sharpness, "smoothness": smoothness}
    loss, metrics, grads = run(s_img, s_txt, target, balance, **options, **extra)
    assert loss == pytest.approx(f(s_img, s_txt), rel=1e-5, abs=1e-5)
    assert metrics["loss"] == loss
    terms = metrics["align"] + sharpness * metrics["sharpness"] - smoothness * metrics["smoothness"]
    assert terms == pytest.approx(loss, abs=1e-5)
    assert_close(grads, central_differences(f, (s_img, s_txt)), 2e-5)


def test_defaults_are_the_documented_ones():
    s_img, s_txt, _ = case("detach", "none")
    explicit = {"target": "detach", "balance": "none", "tau": 0.5, "sharpness": 1.0, "smoothness": 2.0}
    assert float(nclip(s_img, s_txt)[0]) == float(nclip(s_img, s_txt, **explicit)[0])


def test_detach_and_joint_differ_in_gradient_only():
    s_img, s_txt, _ = case("detach", "none")
    detach, joint = run(s_img, s_txt, "detach"), run(s_img, s_txt, "joint")
    assert detach[0] == pytest.approx(joint[0], rel=1e-6)
    assert np.abs(detach[2][0] - joint[2][0]).max() > 0.01


@pytest.mark.parametrize("balance", BALANCES)
def test_no_gradient_to_teacher(balance):
    s_img, s_txt, extra = case("ema", balance)
    extra = jax.tree.map(jnp.asarray, extra)
    grads = jax.grad(lambda e: nclip(s_img, s_txt, target="ema", balance=balance, **e)[0])(extra)
    assert all(not np.any(g) for g in grads.values())


@every_option
def test_one_device_equals_eight(target, balance):
    s_img, s_txt, extra = case(target, balance, b=64, k=48, size=3.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    one = run(s_img, s_txt, target, balance, **extra)
    eight = run(s_img, s_txt, target, balance, sharding=sharding, **extra)
    assert eight[1] == pytest.approx(one[1], rel=1e-5, abs=1e-6)
    assert_close(eight[2], one[2], 1e-5)


@pytest.mark.parametrize("size", [1e3, 1e6])
@every_option
def test_extreme_logits_are_finite(target, balance, size):
    s_img, s_txt, extra = case(target, balance, size=size)
    loss, metrics, grads = run(s_img, s_txt, target, balance, tau=0.1, **extra)
    assert np.isfinite(loss)
    assert np.isfinite(list(metrics.values())).all()
    assert all(np.isfinite(g).all() for g in grads)


def test_unused_clusters_have_finite_gradients():
    s = np.full((4, 8), -1e5)
    s[:, 0] = 0.0
    loss, _, grads = run(s, s)
    assert loss == 0
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(("b", "k"), [(32, 8), (8, 32)])
def test_sinkhorn_marginals(b, k):
    logits = np.random.default_rng(0).normal(size=(b, k)) + np.linspace(0, 3, k)
    plain = oracle_softmax(logits).sum(axis=0) * k / b
    few, many = (np.exp(np.asarray(sinkhorn(logits, 1.0, n), np.float64)) for n in (3, 200))
    for a in (few, many):
        np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(plain - 1).max() > 1
    assert np.abs(few.sum(axis=0) * k / b - 1).max() < 0.2
    np.testing.assert_allclose(many.sum(axis=0) * k / b, 1, rtol=1e-4)


def test_sinkhorn_stays_finite_at_small_temperature():
    logits = 100 * np.random.default_rng(0).normal(size=(8, 16))
    a = np.exp(sinkhorn(logits, 0.01))
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a.sum(axis=1), 1, rtol=1e-4)


def test_bf16_logits_are_cast_up():
    low = [jnp.asarray(s, jnp.bfloat16) for s in case("detach", "none")[:2]]
    loss, metrics = nclip(*low)
    assert loss.dtype == jnp.float32
    assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics.values())
    assert float(loss) == float(nclip(*(s.astype(jnp.float32) for s in low))[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "teacher"}, "'detach', 'joint', 'ema'"),
        ({"balance": "centre"}, "'none', 'sinkhorn'"),
        ({"target": "ema"}, "teacher_img and teacher_txt"),
        ({"target": "ema", "teacher_img": jnp.zeros((6, 5))}, "teacher_img and teacher_txt"),
        ({"teacher_txt": jnp.zeros((6, 5))}, "other targets neither"),
        ({"chunk": 4}, "must divide the batch"),
        ({"chunk": 3}, "needs FactoredLogits"),
    ],
)
def test_wrong_options_raise(options, words):
    with pytest.raises(ValueError, match=words):
        nclip(*case("detach", "none")[:2], **options)


@pytest.mark.parametrize(
    ("s_img", "s_txt", "options"),
    [
        ((6, 5), (6, 4), {}),
        ((6, 5), (6, 5), {"target": "ema", "teacher_img": jnp.zeros((6, 4)), "teacher_txt": jnp.zeros((6, 5))}),
    ],
)
def test_wrong_shapes_raise(s_img, s_txt, options):
    with pytest.raises(AssertionError):
        nclip(jnp.zeros(s_img), jnp.zeros(s_txt), **options)


# --- effective rank


@pytest.mark.parametrize(("b", "d"), [(40, 6), (6, 40), (12, 12)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_effective_rank_equals_spectrum(b, d, size):
    h = np.random.default_rng(0).normal(size=(b, d)) * np.linspace(0.1, 2, d) + 3
    spectrum = np.linalg.svd(h - h.mean(axis=0), compute_uv=False) ** 2
    expected = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert float(effective_rank(jnp.asarray(size * h, jnp.float32))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_counts_equal_directions(rank):
    h = np.concatenate([np.eye(8)[:rank], -np.eye(8)[:rank]]) + 5
    assert float(effective_rank(jnp.asarray(h, jnp.float32))) == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_effective_rank_of_equal_features_is_zero(value):
    row = value * np.random.default_rng(0).normal(size=16)
    h = jnp.asarray(np.tile(row, (1000, 1)), jnp.float32)
    assert float(effective_rank(h)) == 0
    assert not np.any(jax.grad(lambda x: effective_rank(x))(h))
