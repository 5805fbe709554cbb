"""Controls: label smoothing, shuffled targets, caption noise and subsets, against definitions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers import tiny
from tests.losses.test_contrastive import central_differences, embeddings, oracle
from tests.losses.test_noncontrastive import case, oracle_loss
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.objectives.clip import Clip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.train import build

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("scale", "chunk"), [(1 / 0.07, 0), (100.0, 2)])
def test_label_smoothing_equals_oracle(scale, chunk):
    z_img, z_txt = embeddings(8, 4)
    term, smoothed = Clip(label_smoothing=0.1), functools.partial(oracle, "clip", None, smoothing=0.1)

    def loss(z_img, z_txt, scale):
        value, metrics, _ = term({"z_img": z_img, "z_txt": z_txt, "scale": scale}, None, {}, {}, chunk=chunk)
        return value, metrics

    args = [jnp.asarray(x, jnp.float32) for x in (z_img, z_txt, scale)]
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)
    expected = smoothed(z_img, z_txt, scale)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"]) == float(value)
    gradients = central_differences(smoothed, (z_img, z_txt, scale))
    for grad, of_oracle in zip(grads, gradients, strict=True):
        np.testing.assert_allclose(grad, of_oracle, atol=2e-5 * np.abs(of_oracle).max())


@pytest.mark.parametrize("target", ["detach", "ema"])
def test_shuffled_targets_equal_oracle(target):
    s_img, s_txt, extra = case(target)
    term = Nclip(target=target, tau=0.7, sharpness=0.9, smoothness=1.8, shuffle_targets=True)
    order = term.draw(jax.random.key(3), {"text": np.zeros((len(s_img), 4))}, 16)["target_order"]
    assert sorted(order) == list(range(len(s_img))) and not (order == np.arange(len(s_img))).any()
    of = (extra["teacher_img"], extra["teacher_txt"]) if target == "ema" else (s_img, s_txt)
    targets = [scipy.special.softmax(x / 0.7, axis=-1)[np.asarray(order)] for x in of]

    def loss(s_img, s_txt):
        teacher = {"s_img": of[0], "s_txt": of[1]} if target == "ema" else None
        return term({"s_img": s_img, "s_txt": s_txt}, teacher, {}, {"target_order": order})[:2]

    args = [jnp.asarray(x, jnp.float32) for x in (s_img, s_txt)]
    (value, _), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)

    def expected(a, b):
        return oracle_loss(a, b, targets, 0.7, 0.9, 1.8)

    assert float(value) == pytest.approx(expected(s_img, s_txt), rel=1e-5)
    for grad, of_oracle in zip(grads, central_differences(expected, (s_img, s_txt)), strict=True):
        np.testing.assert_allclose(grad, of_oracle, atol=2e-5)


def test_the_order_of_targets_changes_with_the_step():
    orders = [Nclip(shuffle_targets=True).draw(jax.random.key(i), {"text": np.zeros((64, 4))}, 16) for i in (0, 0, 1)]
    first, again, other = (np.asarray(drawn["target_order"]) for drawn in orders)
    assert (first == again).all() and (first != other).any()
    assert Nclip().draw(jax.random.key(0), {}, 16) == {}


def metrics_of_a_step(devices=8, **changes):
    p = build.build(tiny.config("xclip", **changes), jax.devices()[:devices])
    batch = loader.to_global(tiny.batch(0, eot=p.tokenizer.eot_id), p.mesh)
    metrics = jax.device_get(p.compiled(tiny.drawn(p), batch)[1])
    return {name: float(x) for name, x in metrics.items()}


SHUFFLED = {"objective__nclip__shuffle_targets": True}


@pytest.fixture(scope="module")
def shuffled():
    """Of the whole batch at once, on one device."""
    return metrics_of_a_step(1, **SHUFFLED)


def test_a_step_with_shuffled_targets(shuffled):
    plain = metrics_of_a_step(1)
    assert shuffled["clip/loss"] == pytest.approx(plain["clip/loss"], rel=1e-5)
    assert shuffled["nclip/sharpness"] == pytest.approx(plain["nclip/sharpness"], rel=1e-5)
    assert abs(shuffled["nclip/align"] - plain["nclip/align"]) > 0.1


@pytest.mark.parametrize(
    "changes", [pytest.param({"loss__chunk_size": 8}, marks=pytest.mark.slow), {"optim__microbatches": 2}]
)
def test_shuffled_targets_are_those_of_the_whole_batch(changes, shuffled):
    """In chunks and microbatches too, and on eight devices."""
    assert metrics_of_a_step(**SHUFFLED, **changes) == pytest.approx(shuffled, rel=1e-5, abs=1e-5)


def test_joint_targets_cannot_be_shuffled():
    changes = {"objective__nclip__shuffle_targets": True, "objective__nclip__target": "joint"}
    with pytest.raises(UserError, match="shuffle_targets needs"):
        schema.resolve(tiny.config("nclip", **changes))
