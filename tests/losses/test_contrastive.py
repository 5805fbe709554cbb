"""CLIP's and SigLIP's losses against a float64 oracle, open_clip, closed forms and eight devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers.util import assert_close, central_differences
from xclip_jax.losses import contrastive

SCALES = [1.0, 1 / 0.07, 100.0]
BIASES = [-10.0, 0.5]
CASES = [("softmax", scale, None) for scale in SCALES] + [("sigmoid", s, bias) for s in SCALES for bias in BIASES]


def embeddings(b, e=8, seed=0, together=1.0):
    """Unit vectors, float64; `together` pulls the two of a pair towards each other."""
    rng = np.random.default_rng(seed)
    z_img, z_txt = rng.normal(size=(2, b, e))
    z_txt = z_txt + together * z_img
    return tuple(z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_img, z_txt))


def oracle(name, z_img, z_txt, scale, bias):
    """Pair by pair in float64, from the definitions."""
    b = len(z_img)
    total = 0.0
    for i in range(b):
        if name == "softmax":
            rows = [scale * z_img[i] @ z_txt[j] for j in range(b)]
            columns = [scale * z_img[j] @ z_txt[i] for j in range(b)]
            for scores in (rows, columns):
                total += 0.5 * (np.logaddexp.reduce(scores) - scores[i])
        else:
            for j in range(b):
                y = 1.0 if i == j else -1.0
                total += np.logaddexp(0.0, -y * (scale * z_img[i] @ z_txt[j] + bias))
    return total / b


@functools.cache
def compiled(name, arity):
    return jax.jit(jax.value_and_grad(getattr(contrastive, name), argnums=tuple(range(arity)), has_aux=True))


def value_and_grad(name, *args, sharding=None):
    """Value, gradients by every argument, and metrics, under jit; bias None means that there is none."""
    args = [jnp.asarray(arg, jnp.float32) for arg in args if arg is not None]
    if sharding is not None:
        args[:2] = jax.device_put(args[:2], sharding)
        assert len(args[0].sharding.device_set) == 8
    (loss, metrics), grads = compiled(name, len(args))(*args)
    return loss, grads, metrics


@pytest.mark.parametrize(("name", "scale", "bias"), CASES)
def test_equals_oracle(name, scale, bias):
    z_img, z_txt = embeddings(5, 4)
    args = [z_img, z_txt, scale] + ([bias] if name == "sigmoid" else [])

    def f(z_img, z_txt, scale, bias=None):
        return oracle(name, z_img, z_txt, scale, bias)

    loss, grads, metrics = value_and_grad(name, *args)
    assert float(loss) == pytest.approx(f(*args), rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    assert_close(grads, central_differences(f, args), 2e-5)


@pytest.mark.parametrize(("name", "scale", "bias"), CASES)
def test_equals_open_clip(name, scale, bias):
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("open_clip.loss")
    args = [*embeddings(16, 32, seed=1), scale] + ([bias] if name == "sigmoid" else [])
    tensors = [torch.tensor(arg, dtype=torch.float32, requires_grad=True) for arg in args]
    peer = peers.ClipLoss() if name == "softmax" else peers.SigLipLoss()
    expected = peer(*tensors)
    expected.backward()
    loss, grads, _ = value_and_grad(name, *args)
    # A logit of 100 is rounded to 4e-6 in fp32, theirs and ours.
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert_close(grads, [t.grad.numpy() for t in tensors], 2e-5)


@pytest.mark.parametrize(("name", "bias"), [("softmax", None), ("sigmoid", -10.0)])
def test_one_device_equals_eight(name, bias):
    args = [*embeddings(64, 32, seed=2), 1 / 0.07, bias]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one = value_and_grad(name, *args)
    eight = value_and_grad(name, *args, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert float(eight[0]) == pytest.approx(float(one[0]), rel=1e-5)
    assert_close(eight[1], one[1], 1e-5)
    for key in one[2]:
        assert float(eight[2][key]) == pytest.approx(float(one[2][key]), rel=1e-5), key


@pytest.mark.parametrize(("name", "bias"), [("softmax", None), ("sigmoid", 0.0)])
def test_mean_of_shards_is_another_loss(name, bias):
    z_img, z_txt = embeddings(64, 32, seed=2)
    whole = oracle(name, z_img, z_txt, 1 / 0.07, bias)
    shards = [value_and_grad(name, z_img[i : i + 8], z_txt[i : i + 8], 1 / 0.07, bias)[0] for i in range(0, 64, 8)]
    assert abs(np.mean(shards) - whole) > 0.1 * whole


def test_softmax_of_identical_pairs_is_a_blind_guess():
    z = np.tile(embeddings(1)[0], (6, 1))
    loss, grads, metrics = value_and_grad("softmax", z, z, 50.0)
    assert float(loss) == pytest.approx(np.log(6), rel=1e-5)
    assert float(metrics["ln_b"]) == pytest.approx(np.log(6), rel=1e-6)
    assert float(metrics["acc_img"]) == pytest.approx(1 / 6)
    assert float(grads[2]) == pytest.approx(0, abs=1e-6)


def test_perfect_pairs():
    eye = np.eye(8)
    loss, _, metrics = value_and_grad("softmax", eye, eye, 10.0)
    assert float(loss) == pytest.approx(np.log1p(7 * np.exp(-10)), rel=1e-2)
    assert float(metrics["acc_img"]) == float(metrics["acc_txt"]) == 1.0
    loss, _, _ = value_and_grad("sigmoid", eye, eye, 20.0, -10.0)
    assert float(loss) == pytest.approx(8 * np.log1p(np.exp(-10)), rel=1e-4)


def test_accuracies_are_of_the_right_direction():
    z_img = np.eye(3)
    z_txt = np.eye(3)[[0, 0, 0]]
    _, _, metrics = value_and_grad("softmax", z_img, z_txt + [[0], [0], [0.1]] * np.eye(3)[0], 1.0)
    # Image 0 prefers the longest text, 2; images 1 and 2 see ties, won by text 0. All texts prefer image 0.
    assert float(metrics["acc_img"]) == 0.0
    assert float(metrics["acc_txt"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("name", "bias"), [("softmax", None), ("sigmoid", -1e4), ("sigmoid", 1e4)])
def test_extreme_scale_is_finite(name, bias):
    z_img, z_txt = embeddings(8, together=0.0)
    loss, grads, _ = value_and_grad(name, z_img, z_txt, 1e6, bias)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in grads)
    assert float(loss) > 1e3


@pytest.mark.parametrize(("name", "more"), [("softmax", ()), ("sigmoid", (-10.0,))])
def test_bf16_embeddings_are_cast_up(name, more):
    low = [jnp.asarray(z, jnp.bfloat16) for z in embeddings(32)]
    f = getattr(contrastive, name)
    loss, metrics = f(*low, 100.0, *more)
    expected = f(*(z.astype(jnp.float32) for z in low), 100.0, *more)[0]
    assert loss.dtype == jnp.float32
    assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics.values())
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("shapes", "scale"), [(((4, 8), (5, 8)), 1.0), (((4, 8), (4, 9)), 1.0), (((8,), (8,)), 1.0), (((4, 8),) * 2, [1.0])]
)
def test_wrong_shapes_raise(shapes, scale):
    z_img, z_txt = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(AssertionError):
        contrastive.softmax(z_img, z_txt, jnp.asarray(scale))
    with pytest.raises(AssertionError):
        contrastive.sigmoid(z_img, z_txt, jnp.asarray(scale), 0.0)


KEYS = np.array([[7, 1], [7, 2], [7, 1], [-3, 1], [7, 2], [7, 1], [0, 0]])  # groups of 3, 2, 1 and 1


def positives_oracle(name, z_img, z_txt, scale, bias, smoothing):
    """Pair by pair in float64: cross-entropy with targets spread over equal keys, or the sum of sigmoids."""
    b, total = len(z_img), 0.0
    same = (KEYS[:, None] == KEYS).all(-1)
    for i in range(b):
        if name == "softmax":
            target = (1 - smoothing) * same[i] / same[i].sum() + smoothing / b
            for scores in (scale * z_txt @ z_img[i], scale * z_img @ z_txt[i]):
                total += 0.5 * (np.logaddexp.reduce(scores) - target @ scores)
        else:
            sign = np.where(same[i], 1, -1)
            total += np.logaddexp(0.0, -sign * (scale * z_txt @ z_img[i] + bias)).sum()
    return total / b


@pytest.mark.parametrize(
    ("name", "scale", "bias", "smoothing"),
    [
        ("softmax", 14.0, 0.0, 0.0),
        ("softmax", 100.0, 0.0, 0.1),
        ("sigmoid", 10.0, -10.0, 0.0),
        ("sigmoid", 30.0, 5.0, 0),
    ],
)
@pytest.mark.parametrize("devices", [1, 7])
def test_pairs_with_equal_keys_are_positives(name, scale, bias, smoothing, devices):
    args = [*embeddings(7, 4, seed=3), scale] + ([bias] if name == "sigmoid" else [])

    def f(z_img, z_txt, scale, bias=0.0):
        return positives_oracle(name, z_img, z_txt, scale, bias, smoothing)

    options = {"label_smoothing": smoothing} if smoothing else {}
    arrays, keys = [jnp.asarray(arg, jnp.float32) for arg in args], jnp.asarray(KEYS)
    expected, gradients = f(*args), central_differences(f, args)
    if devices > 1:
        mesh = jax.make_mesh((7,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:7])
        rows = NamedSharding(mesh, PartitionSpec("data"))
        arrays[:2], keys = jax.device_put(arrays[:2], rows), jax.device_put(keys, rows)
    loss = functools.partial(getattr(contrastive, name), **options)
    every = tuple(range(len(args)))
    step = jax.jit(jax.value_and_grad(lambda keys, *args: loss(*args, keys=keys), [i + 1 for i in every], has_aux=True))
    (value, metrics), grads = step(keys, *arrays)
    assert float(value) == pytest.approx(expected, rel=1e-5) and float(metrics["loss"]) == float(value)
    if name == "sigmoid":
        assert float(metrics["positives"]) == pytest.approx((3 * 3 + 2 * 2 + 1 + 1) / 7)
    assert_close(list(grads), gradients, 3e-5)


def test_keys_that_are_all_different_change_nothing():
    z_img, z_txt = map(jnp.float32, embeddings(6))
    for name, scalars in (("softmax", (14.0,)), ("sigmoid", (10.0, -10.0))):
        loss = getattr(contrastive, name)
        value, metrics = loss(z_img, z_txt, *scalars, keys=jnp.arange(6))
        assert metrics.pop("positives", 1) == 1
        assert jax.tree.all(jax.tree.map(jnp.array_equal, (value, metrics), loss(z_img, z_txt, *scalars)))


# --- robust losses


def softmax64(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def generalised(q):
    """Equation 5 of arXiv 1805.07836 of the distributions of rows, whose class is their own."""
    return lambda p: -np.expm1(q * np.log(np.diag(p))) / q


ROBUST = [
    ({"q": 0.7}, generalised(0.7)),
    ({"q": 1e-6}, generalised(1e-6)),
    ({"q": 1.0}, lambda p: np.abs(p - np.eye(len(p))).sum(axis=1) / 2),  # half of the mean absolute error
]


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("options", "of_rows"), ROBUST)
def test_robust_losses_equal_their_definitions(options, of_rows, scale):
    args = embeddings(8, 4, seed=5, together=0.5), scale
    rows = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))

    def f(z_img, z_txt, scale):
        logits = scale * z_img @ z_txt.T
        return np.mean([of_rows(softmax64(logits)), of_rows(softmax64(logits.T))])

    expected, gradients = f(*args[0], scale), central_differences(f, (*args[0], scale))
    loss = jax.jit(jax.value_and_grad(functools.partial(contrastive.softmax, **options), (0, 1, 2), has_aux=True))
    for place in (lambda z: z, lambda z: jax.device_put(z, rows)):
        z = [place(jnp.asarray(x, jnp.float32)) for x in args[0]]
        (value, metrics), grads = loss(*z, scale)
        assert float(value) == pytest.approx(expected, rel=1e-5) and float(metrics["loss"]) == float(value)
        assert_close(grads, gradients, 2e-4)  # at a scale of 100 each logit has an error of 6e-6


def test_generalised_cross_entropy_has_a_bound_and_a_limit():
    z_img, z_txt = map(jnp.float32, embeddings(6, together=-3.0))
    worst = float(contrastive.softmax(z_img, z_txt, 100.0, q=0.5)[0])
    assert 1.9 < worst <= 2.0 < 20 < float(contrastive.softmax(z_img, z_txt, 100.0)[0])
    near = contrastive.softmax(z_img, z_txt, 1.0, q=1e-3)[0]
    assert float(near) == pytest.approx(float(contrastive.softmax(z_img, z_txt, 1.0)[0]), rel=3e-3)


@pytest.mark.parametrize("q", [1e-8, 1e-6, 1e-4, 1e-2, 0.7, 1.0])
def test_generalised_cross_entropy_has_all_its_digits(q):
    """In float32, near 0 and where p^q is far below the rounding of 1, value and derivative."""
    x = np.geomspace(1e-7, 80, 60).astype(np.float32)
    value, slope = jax.jvp(lambda x: contrastive.robust(x, q), (jnp.asarray(x),), (jnp.ones_like(x),))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(value, -np.expm1(-q * exact) / q, rtol=5e-7)
    np.testing.assert_allclose(slope, np.exp(-q * exact), rtol=1e-5)  # of the product q x at 80


@pytest.mark.parametrize(("options", "_"), ROBUST)
def test_the_robust_loss_of_a_blind_guess(options, _):
    z = jnp.asarray(np.tile(embeddings(1)[0], (6, 1)), jnp.float32)
    loss, metrics = contrastive.softmax(z, z, 50.0, **options)
    q = options["q"]
    expected = (1 - 6**-q) / q
    assert float(loss) == pytest.approx(expected, rel=1e-5) == float(metrics["blind"])
    assert float(contrastive.robust(math.log(6), q)) == pytest.approx(expected, rel=1e-6)
