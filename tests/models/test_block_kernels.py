"""Products of a block by kernels against their formulas in float64, and as XLA computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers.util import assert_close
from xclip_jax.models import block_kernels
from xclip_jax.models.block_kernels import Norm, Weights, finish, project
from xclip_jax.models.layers import ACTIVATIONS

pytestmark = pytest.mark.long

ROWS, WIDTH, HIDDEN, EPS = 64, 128, 256, 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per core, and several chunks of hidden units."""
    monkeypatch.setattr(block_kernels, "ROWS", 16)
    monkeypatch.setattr(block_kernels, "CHUNK", 128)


def arrays(dtype):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(ROWS, WIDTH)) for _ in range(2)]
    scale, offset = 1 + rng.normal(size=(2, 1, WIDTH)) / 4
    shapes = [(WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    (out, out_bias), (up, up_bias), (down, down_bias) = [
        (rng.normal(size=shape) / shape[0] ** 0.5, rng.normal(size=(1, shape[1]))) for shape in shapes
    ]
    weights = Weights(out, out_bias, scale, offset, up, up_bias, down, down_bias)
    cast = {name: np.asarray(x, dtype if name in ("out", "up", "down") else np.float32) for name, x in
            weights._asdict().items()}  # fmt: skip
    heads = np.asarray(rng.normal(size=(WIDTH, 3 * WIDTH)) / WIDTH**0.5, dtype)
    return [np.asarray(x, dtype) for x in rows], Weights(**cast), heads


def normalised(x, norm, numbers):
    centred = x - x.mean(1, keepdims=True)
    return centred / numbers.sqrt((centred**2).mean(1, keepdims=True) + EPS) * norm.scale + norm.offset


def whole(x, attended, weights, act, numbers):
    y = x + attended @ weights.out + weights.out_bias
    hidden = act(normalised(y, weights, numbers) @ weights.up + weights.up_bias)
    return y + hidden @ weights.down + weights.down_bias


EXACT = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * scipy.special.expit(1.702 * x),
}


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize(("act", "cores"), [("gelu", 1), ("gelu_tanh", 2), ("quick_gelu", 1)])
def test_finish_is_the_formula(act, cores):
    (x, attended), weights, _ = arrays(np.float32)
    kernel = lambda *args: finish(*args, ACTIVATIONS[act], EPS, cores, interpret=True)  # noqa: E731
    formula = lambda *args: whole(*args, ACTIVATIONS[act], jnp)  # noqa: E731
    exact = whole(*float64((x, attended, weights)), EXACT[act], np)
    np.testing.assert_allclose(kernel(x, attended, weights), exact, atol=1e-5)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    grads = (jax.tree.leaves(jax.vjp(form, x, attended, weights)[1](g)) for form in (kernel, formula))
    assert_close(*grads, 2e-6)


@pytest.mark.parametrize("cores", [1, 2])
def test_project_is_the_formula(cores):
    (x, _), weights, heads = arrays(np.float32)
    norm = Norm(weights.scale, weights.offset)
    kernel = lambda x, norm, heads: project(x, norm, heads, EPS, cores, interpret=True)  # noqa: E731
    formula = lambda x, norm, heads: (normalised(x, norm, jnp) @ heads, x)  # noqa: E731
    exact = normalised(*float64((x, norm)), np) @ float64(heads)
    np.testing.assert_allclose(kernel(x, norm, heads)[0], exact, atol=1e-5)
    rng = np.random.default_rng(1)
    g = tuple(jnp.asarray(rng.normal(size=(ROWS, n)), jnp.float32) for n in (3 * WIDTH, WIDTH))
    grads = (jax.tree.leaves(jax.vjp(form, x, norm, heads)[1](g)) for form in (kernel, formula))
    assert_close(*grads, 2e-6)


def test_bf16_is_nearer_to_float64_than_the_definition():
    (x, attended), weights, _ = arrays(jnp.bfloat16)
    exact = whole(*float64((x, attended, weights)), EXACT["gelu"], np)
    rounded = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), weights)
    forms = [
        finish(x, attended, weights, ACTIVATIONS["gelu"], EPS, 1, interpret=True),
        whole(jnp.asarray(x), jnp.asarray(attended), rounded, ACTIVATIONS["gelu"], jnp),
    ]
    errors = [np.abs(np.asarray(form, np.float64) - exact) for form in forms]
    assert errors[0].mean() < errors[1].mean() and errors[0].max() < errors[1].max()


def test_which_sizes_fit(monkeypatch):
    monkeypatch.undo()
    assert block_kernels.fits("TPU v6 lite", 25600, 768, 3072, 1)
    assert block_kernels.fits("TPU7x", 10240, 512, 2048, 1)
    assert not block_kernels.fits("TPU7x", 10240 + 128, 512, 2048, 1), "not a whole number of blocks per core"
    assert not block_kernels.fits("TPU v6 lite", 25600, 192, 768, 1), "not whole lanes"
    assert block_kernels.fits("TPU v6 lite", 33792, 1024, 4096, 1)
    assert not block_kernels.fits("TPU7x", 33792, 1024, 4096, 1), "more than the vector memory"
    assert not block_kernels.fits("TPU v4", 25600, 768, 3072, 2)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_they_compile_for_each_generation(topology, monkeypatch):
    monkeypatch.undo()
    from xclip_jax.train.cost.roofline import devices_of

    device = devices_of(topology)[0][0]
    where = jax.sharding.SingleDeviceSharding(device)
    rows, width, hidden = 1024, 512, 2048
    assert block_kernels.fits(device.device_kind, rows, width, hidden, device.num_cores)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    vector = shape(1, width, dtype=jnp.float32)
    up_bias = shape(1, hidden, dtype=jnp.float32)
    weights = Weights(shape(width, width), vector, vector, vector, shape(width, hidden), up_bias, shape(hidden, width),
                      vector)  # fmt: skip
    x, heads = shape(rows, width), shape(width, 3 * width)

    def block(x, norm, heads, weights):
        attended = project(x, norm, heads, EPS, device.num_cores, interpret=False)[0][:, :width]
        return finish(x, attended, weights, ACTIVATIONS["gelu"], EPS, device.num_cores, interpret=False)

    def both(*args):
        out, pullback = jax.vjp(block, *args)
        return pullback(out)

    program = jax.jit(both).lower(x, Norm(vector, vector), heads, weights).compile().as_text()
    assert program.count("tpu_custom_call") == 4
    assert f"[{rows},{hidden}]" not in program, "hidden units stay on the chip"
