import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers.util import assert_close, central_differences, rows_over
from xclip_jax.losses.noncontrastive import TARGETS, effective_rank, nclip

# Target, tau, sharpness, smoothness: each term alone, and every target with all of them.
CASES = [
    ("detach", 1.0, 0.0, 0.0),
    ("detach", 1.0, 1.0, 0.0),
    ("detach", 1.0, 0.0, 1.0),
    *((target, 0.3, 0.7, 1.5) for target in TARGETS),
]


def case(target, b=6, k=5, seed=0, size=1.5):
    """Random float64 logits, and a teacher's if the target needs them."""
    s_img, s_txt, t_img, t_txt = size * np.random.default_rng(seed).normal(size=(4, b, k))
    return s_img, s_txt, {"teacher_img": t_img, "teacher_txt": t_txt} if target == "ema" else {}


def oracle_loss(s_img, s_txt, targets, tau, sharpness, smoothness):
    p, q = scipy.special.softmax(s_img / tau, axis=1), scipy.special.softmax(s_txt / tau, axis=1)
    p_hat, q_hat = targets
    align = -0.5 * np.mean((p_hat * np.log(q)).sum(axis=1) + (q_hat * np.log(p)).sum(axis=1))
    sharp = 0.5 * sum(scipy.special.entr(x).sum(axis=1).mean() for x in (p, q))
    smooth = 0.5 * sum(scipy.special.entr(x.mean(axis=0)).sum() for x in (p, q))
    return align + sharpness * sharp - smoothness * smooth


@functools.cache
def compiled(target):
    """Value, metrics and gradients by both logits; the weights and temperatures are traced."""

    def f(s_img, s_txt, options):
        return nclip(s_img, s_txt, target=target, **options)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))


def run(s_img, s_txt, target="detach", sharding=None, **options):
    # One structure of options, and few shapes, keep compilations few.
    options = {"tau": 1.0, "sharpness": 1.0, "smoothness": 2.0} | options
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (s_img, s_txt, options))
    if sharding is not None:
        arrays = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x, arrays)
        assert len(arrays[0].sharding.device_set) == 8
    (loss, metrics), grads = compiled(target)(*arrays)
    return float(loss), {key: float(value) for key, value in metrics.items()}, grads


@pytest.mark.parametrize(("target", "tau", "sharpness", "smoothness"), CASES)
def test_equals_oracle(target, tau, sharpness, smoothness):
    s_img, s_txt, extra = case(target)

    def targets_of(s_img, s_txt):
        return [scipy.special.softmax(x / tau, axis=1) for x in (extra.values() if extra else (s_img, s_txt))]

    fixed = targets_of(s_img, s_txt)

    def f(a, b):
        return oracle_loss(a, b, targets_of(a, b) if target == "joint" else fixed, tau, sharpness, smoothness)

    options = {"tau": tau, "sharpness": sharpness, "smoothness": smoothness}
    loss, metrics, grads = run(s_img, s_txt, target, **options, **extra)
    assert loss == pytest.approx(f(s_img, s_txt), rel=1e-5, abs=1e-5)
    assert metrics["loss"] == loss
    terms = metrics["align"] + sharpness * metrics["sharpness"] - smoothness * metrics["smoothness"]
    assert terms == pytest.approx(loss, abs=1e-5)
    assert_close(grads, central_differences(f, (s_img, s_txt)), 2e-5)


def test_defaults_are_the_documented_ones():
    s_img, s_txt, _ = case("detach")
    explicit = {"target": "detach", "tau": 0.5, "sharpness": 1.0, "smoothness": 2.0}
    assert float(nclip(s_img, s_txt)[0]) == float(nclip(s_img, s_txt, **explicit)[0])


def test_no_gradient_to_teacher():
    s_img, s_txt, extra = case("ema")
    grads = jax.grad(lambda e: nclip(s_img, s_txt, target="ema", **e)[0])(jax.tree.map(jnp.asarray, extra))
    assert all(not np.any(g) for g in grads.values())


@pytest.mark.parametrize("target", TARGETS)
def test_one_device_equals_eight(target):
    s_img, s_txt, extra = case(target, b=64, k=48, size=3.0)
    one = run(s_img, s_txt, target, **extra)
    eight = run(s_img, s_txt, target, rows_over(8), **extra)
    assert eight[1] == pytest.approx(one[1], rel=1e-5, abs=1e-6)
    assert_close(eight[2], one[2], 1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_extreme_logits_are_finite(target):
    s_img, s_txt, extra = case(target, size=1e6)
    loss, metrics, grads = run(s_img, s_txt, target, tau=0.1, **extra)
    assert np.isfinite([loss, *metrics.values()]).all()
    assert all(np.isfinite(g).all() for g in grads)


def test_unused_clusters_have_finite_gradients():
    s = np.full((6, 5), -1e5)
    s[:, 0] = 0.0
    loss, _, grads = run(s, s)
    assert loss == 0
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": "teacher"}, "'teacher'; expected one of"),
        ({"target": "ema", "teacher_img": jnp.zeros((6, 5))}, "with teacher_img and teacher_txt"),
        ({"teacher_txt": jnp.zeros((6, 5))}, "'detach'"),
        ({"chunk": 4}, "chunk=4"),
        ({"chunk": 3}, "FactoredLogits"),
        ({"target": "ema", "teacher_img": jnp.zeros((6, 4)), "teacher_txt": jnp.zeros((6, 5))}, ""),
    ],
)
def test_wrong_options_raise(options, error):
    with pytest.raises(ValueError if error else AssertionError, match=error or None):
        nclip(*case("detach")[:2], **options)


@pytest.mark.parametrize(("b", "d", "size"), [(40, 6, 1e-12), (6, 40, 1.0), (12, 12, 1e12)])
def test_effective_rank_equals_spectrum(b, d, size):
    h = np.random.default_rng(0).normal(size=(b, d)) * np.linspace(0.1, 2, d) + 3
    spectrum = np.linalg.svd(h - h.mean(axis=0), compute_uv=False) ** 2
    expected = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert float(effective_rank(jnp.asarray(size * h, jnp.float32))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_effective_rank_of_equal_features_is_zero(value):
    h = jnp.asarray(np.tile(value * np.random.default_rng(0).normal(size=16), (1000, 1)), jnp.float32)
    assert float(effective_rank(h)) == 0
    assert not np.any(jax.grad(effective_rank)(h))
