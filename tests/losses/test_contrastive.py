import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers.util import assert_close, central_differences, rows_over
from xclip_jax.losses import contrastive, noncontrastive
from xclip_jax.parallel.mesh import AXES, batch_sharding, make_mesh, replicated
from xclip_jax.parallel.sharding import FactoredLogits, MeshLayout, layout_scope

KEYS = np.array([[7, 1], [7, 2], [7, 1], [-3, 1], [7, 2], [7, 1], [0, 0]])  # groups of 3, 2, 1 and 1


def embeddings(b, e=8, seed=0, together=1.0):
    """Unit vectors, float64; `together` pulls the two of a pair towards each other."""
    rng = np.random.default_rng(seed)
    z_img, z_txt = rng.normal(size=(2, b, e))
    z_txt = z_txt + together * z_img
    return tuple(z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_img, z_txt))


def oracle(name, keys, z_img, z_txt, scale, bias=0.0, smoothing=0.0, q=0.0):
    """Pair by pair in float64: cross-entropy with targets spread over equal keys, or the sum of sigmoids.

    Rows of `z_txt` after those of `z_img` are wrong texts of all images.
    """
    b, total = len(z_img), 0.0
    same = np.eye(b) if keys is None else (keys[:, None] == keys).all(-1)
    for i in range(b):
        if name == "clip":
            target = (1 - smoothing) * same[i] / same[i].sum() + smoothing / b
            for scores in (scale * z_txt @ z_img[i], scale * z_img @ z_txt[i]):
                x = np.logaddexp.reduce(scores) - target @ scores[:b]
                total += 0.5 * (-np.expm1(-q * x) / q if q else x)
        else:
            sign = np.where(np.pad(same[i], (0, len(z_txt) - b)), 1, -1)
            total += np.logaddexp(0.0, -sign * (scale * z_txt @ z_img[i] + bias)).sum()
    return total / b


@pytest.mark.parametrize(
    ("name", "scalars", "smoothing", "keys", "devices"),
    [
        ("clip", [1 / 0.07], 0.0, None, 1),
        ("clip", [100.0], 0.0, None, 7),
        ("clip", [14.0], 0.1, None, 1),
        ("clip", [14.0], 0.0, KEYS, 1),
        ("clip", [100.0], 0.1, KEYS, 7),
        ("siglip", [1.0, -10.0], 0.0, None, 7),
        ("siglip", [100.0, 0.5], 0.0, None, 1),
        ("siglip", [10.0, -10.0], 0.0, KEYS, 7),
    ],
)
def test_equals_oracle(name, scalars, smoothing, keys, devices):
    args = [*embeddings(7, 4, seed=3), *scalars]

    def f(*args):
        return oracle(name, keys, *args, *([0.0] if name == "clip" else []), smoothing)

    arrays = [jnp.asarray(arg, jnp.float32) for arg in args]
    keys_of_batch = None if keys is None else jnp.asarray(keys)
    arrays[:2], keys_of_batch = jax.device_put((arrays[:2], keys_of_batch), rows_over(devices))
    loss = functools.partial(getattr(contrastive, name), **{"label_smoothing": smoothing} if smoothing else {})
    every = tuple(range(1, len(args) + 1))
    step = jax.jit(jax.value_and_grad(lambda keys, *args: loss(*args, keys=keys), every, has_aux=True))
    (value, metrics), grads = step(keys_of_batch, *arrays)
    assert float(value) == pytest.approx(f(*args), rel=1e-5) and float(metrics["loss"]) == float(value)
    assert float(metrics["ln_b"]) == pytest.approx(np.log(7), rel=1e-6)
    if name == "siglip" and keys is not None:
        assert float(metrics["positives"]) == pytest.approx((3 * 3 + 2 * 2 + 1 + 1) / 7)
    assert_close(list(grads), central_differences(f, args), 3e-5)


@pytest.mark.parametrize(
    ("name", "scalars", "options", "chunk", "sizes"),
    [
        ("clip", (100.0,), {}, 0, ()),
        ("clip", (14.0,), {"label_smoothing": 0.1, "keys": KEYS[[*range(7), 0]]}, 0, (2, 2, 2)),
        ("clip", (14.0,), {"q": 0.7}, 2, (8, 1, 1)),
        ("siglip", (10.0, -10.0), {}, 0, (8, 1, 1)),
        ("siglip", (100.0, 0.5), {"keys": KEYS[[*range(7), 0]]}, 4, ()),
    ],
)
def test_negatives_equal_the_oracle(name, scalars, options, chunk, sizes):
    """Of two wrong texts per pair those that exist are further texts of all images; the rest are nowhere."""
    z_img, z_txt = embeddings(8, 4, seed=3)
    wrong = embeddings(16, 4, seed=4)[0] + np.repeat(z_txt, 2, axis=0)
    args = [z_img, np.concatenate([z_txt, wrong / np.linalg.norm(wrong, axis=1, keepdims=True)]), *scalars]
    exists = np.ones(24, bool)
    exists[[8, 10, 11, 17]] = False

    def f(z_img, z_txt, scale, bias=0.0):
        more = {key: value for key, value in options.items() if key == "q"}
        smoothing = options.get("label_smoothing", 0.0)
        return 3 * oracle(name, options.get("keys"), z_img, z_txt[exists], scale, bias, smoothing, **more)

    given = {key: jnp.asarray(value) if key == "keys" else value for key, value in options.items()}
    arrays = [jnp.asarray(arg, jnp.float32) for arg in args]
    (value, metrics), grads = in_chunks(name, arrays, chunk, sizes, exists=jnp.asarray(exists), **given)
    assert float(value) == pytest.approx(f(*args), rel=1e-5)
    assert_close(list(grads), central_differences(f, args), 1e-4)
    scores = args[0] @ args[1].T
    matching = np.diag(scores[:, :8])[:, None]
    expected = {
        "ln_b": np.log(8),
        "acc_img": np.mean(scores[:, exists].argmax(1) == np.arange(8)),
        "acc_txt": np.mean(scores[:, :8].argmax(0) == np.arange(8)),
        "negatives": 12 / 8,
        "acc_negatives": np.mean((scores[np.arange(16) // 2, np.arange(8, 24)] < matching.repeat(2))[exists[8:]]),
    }
    assert 0 < expected["acc_negatives"] < 1
    assert {key: float(metrics[key]) for key in expected} == pytest.approx(expected, rel=1e-5)


def test_without_a_negative_nothing_changes():
    args = [jnp.asarray(x, jnp.float32) for x in embeddings(8, 4)]
    texts = jnp.concatenate([args[1], jnp.full((8, 4), jnp.nan)])
    for loss, scalars in ((contrastive.clip, [14.0]), (contrastive.siglip, [10.0, -10.0])):
        for chunk in (0, 2):
            value, metrics = loss(args[0], texts, *scalars, exists=jnp.arange(16) < 8, chunk=chunk)
            assert float(value) == pytest.approx(float(loss(*args, *scalars)[0]), rel=1e-6)
            assert float(metrics["negatives"]) == 0 and float(metrics["acc_negatives"]) == 0


def test_accuracies_are_of_the_right_direction():
    z_img = np.eye(3)
    z_txt = np.eye(3)[[0, 0, 0]]
    _, metrics = contrastive.clip(*map(jnp.float32, (z_img, z_txt + [[0], [0], [0.1]] * np.eye(3)[0])), 1.0)
    # Image 0 prefers the longest text, 2; images 1 and 2 see ties, won by text 0. All texts prefer image 0.
    assert float(metrics["acc_img"]) == 0.0
    assert float(metrics["acc_txt"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("name", "scalars"), [("clip", (1e6,)), ("siglip", (1e6, 1e4))])
def test_extreme_scale_is_finite(name, scalars):
    (loss, _), grads = in_chunks(name, tuple(map(jnp.float32, (*embeddings(8, together=0.0), *scalars))), 0)
    chex.assert_tree_all_finite(grads)
    assert 1e3 < float(loss) < np.inf


@pytest.mark.parametrize("args", [((4, 8), (5, 8), ()), ((8,), (8,), ()), ((4, 8), (4, 8), (1,))])
def test_wrong_shapes_raise(args):
    for loss, scalars in ((contrastive.clip, ()), (contrastive.siglip, (0.0,))):
        with pytest.raises(AssertionError):
            loss(*map(jnp.ones, args), *scalars)


def generalised(q):
    """Equation 5 of arXiv 1805.07836 of the distributions of rows, whose class is their own."""
    return lambda p: -np.expm1(q * np.log(np.diag(p))) / q


ROBUST = [
    (0.7, generalised(0.7), 14.0, 1),
    (0.7, generalised(0.7), 100.0, 8),
    (1e-6, generalised(1e-6), 14.0, 1),
    (1.0, lambda p: np.abs(p - np.eye(len(p))).sum(axis=1) / 2, 1.0, 1),  # half of the mean absolute error
]


@pytest.mark.parametrize(("q", "of_rows", "scale", "devices"), ROBUST)
def test_robust_losses_equal_their_definitions(q, of_rows, scale, devices):
    args = *embeddings(8, 4, seed=5, together=0.5), scale

    def f(z_img, z_txt, scale):
        logits = scale * z_img @ z_txt.T
        return np.mean([of_rows(scipy.special.softmax(x, axis=1)) for x in (logits, logits.T)])

    loss = jax.jit(jax.value_and_grad(functools.partial(contrastive.clip, q=q), (0, 1, 2), has_aux=True))
    z = jax.device_put([jnp.asarray(x, jnp.float32) for x in args[:2]], rows_over(devices))
    (value, metrics), grads = loss(*z, scale)
    assert float(value) == pytest.approx(f(*args), rel=1e-5) and float(metrics["loss"]) == float(value)
    assert_close(grads, central_differences(f, args), 2e-4)  # at a scale of 100 each logit has an error of 6e-6
    assert float(metrics["blind"]) == pytest.approx((1 - 8**-q) / q, rel=1e-5)


@pytest.mark.parametrize("q", [1e-8, 1e-2, 1.0])
def test_generalised_cross_entropy_has_all_its_digits(q):
    """In float32, near 0 and where p^q is far below the rounding of 1, value and derivative."""
    x = np.geomspace(1e-7, 80, 60).astype(np.float32)
    value, slope = jax.jvp(lambda x: contrastive.robust(x, q), (jnp.asarray(x),), (jnp.ones_like(x),))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(value, -np.expm1(-q * exact) / q, rtol=5e-7)
    np.testing.assert_allclose(slope, np.exp(-q * exact), rtol=1e-5)  # of the product q x at 80


DATA, ALL = (8, 1, 1), (2, 2, 2)
FORMS = [
    ("clip", {}, (100.0,), (1, ALL)),
    ("clip", {"label_smoothing": 0.1, "keys": True}, (14.0,), (16, DATA)),
    ("clip", {"q": 0.7}, (14.0,), (24, ())),
    ("siglip", {}, (10.0, -10.0), (24, ())),
    ("siglip", {"keys": True}, (100.0, 5.0), (16, ALL)),
]


def in_chunks(name, args, chunk, sizes=(), **options):
    """Value, metrics and all gradients, on one device or the mesh of `sizes`; the weight of the loss is not 1."""

    def weighted(*args):
        value, metrics = getattr(contrastive, name)(*args, chunk=chunk, **options)
        return 3 * value, metrics

    step = jax.jit(jax.value_and_grad(weighted, tuple(range(len(args))), has_aux=True))
    if not sizes:
        return step(*args)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    with layout_scope(MeshLayout(mesh, "dp")):
        return step(*jax.device_put(args[:2], batch_sharding(mesh)), *args[2:])


@pytest.mark.parametrize(("name", "options", "scalars", "chunks"), FORMS)
def test_chunks_on_any_mesh_equal_the_whole(name, options, scalars, chunks):
    z_img, z_txt = embeddings(96, 12, together=0.0)
    z_txt[[70, 15]], z_img[[3, 15, 70, 80]] = z_txt[[3, 80]], z_txt[[3, 80, 3, 80]]  # ties
    args = tuple(jnp.asarray(x, jnp.float32) for x in (z_img, z_txt, *scalars))
    if "keys" in options:
        options = options | {"keys": jnp.asarray(np.random.default_rng(1).integers(0, 60, (96, 2)) // [1, 60])}
    values, grads = in_chunks(name, args, *chunks, **options)
    values_1, grads_1 = in_chunks(name, args, 0, **options)
    chex.assert_trees_all_close(values, values_1, rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in grads_1)
    chex.assert_trees_all_close(grads, grads_1, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize(("name", "e", "scalars"), [("clip", 5, (100.0,)), ("siglip", 48, (100.0, -50.0))])
def test_chunks_of_identical_pairs_at_a_large_scale_against_float64(name, e, scalars):
    """The loss is far below the logits, of which rounding in float32 is 1e-5."""
    z = embeddings(96, e)[0].astype(np.float32)
    wide = z.astype(np.float64)
    logits = scalars[0] * wide @ wide.T + sum(scalars[1:])
    if name == "clip":
        p = scipy.special.softmax(logits, axis=1)
        expected = -np.log(np.diag(p)).mean()
        weights = (p + p.T) / 2 - np.eye(96)
    else:
        sign = 2 * np.eye(96) - 1
        expected = np.logaddexp(0, -sign * logits).sum() / 96
        weights = -sign / (1 + np.exp(sign * logits))
    args = (jnp.asarray(z), jnp.asarray(z), *map(jnp.float32, scalars))
    (value, _), grads = in_chunks(name, args, 12, (8, 1, 1))
    weights *= 3 / 96
    assert 1e-3 < expected < 0.1
    assert float(value) == pytest.approx(3 * expected, rel=3e-5)
    by_z = scalars[0] * weights @ wide, scalars[0] * weights.T @ wide
    for grad, exact in zip(grads, (*by_z, (weights * (wide @ wide.T)).sum()), strict=False):
        np.testing.assert_allclose(grad, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_chunks_pass_on_a_number_that_is_none():
    z_img, z_txt = (jnp.asarray(z, jnp.float32) for z in embeddings(16))
    (value, _), (grad, *_) = in_chunks("clip", (z_img.at[4, 0].set(jnp.nan), z_txt, jnp.float32(14)), 4)
    assert jnp.isnan(value) and jnp.isnan(grad[4]).all()


def test_a_chunk_divides_the_batch():
    with pytest.raises(AssertionError, match=r"16.*5"):
        contrastive.clip(*map(jnp.float32, embeddings(16)), 14.0, chunk=5)


def temporaries(fn, *args):
    """Bytes of temporaries on each of eight devices for the value and all gradients of `fn`."""
    mesh = args[0].sharding.mesh
    out = ((replicated(mesh), replicated(mesh)), tuple(x.sharding for x in args))
    with layout_scope(MeshLayout(mesh, "dp")):
        step = jax.jit(jax.value_and_grad(fn, tuple(range(len(args))), has_aux=True), out_shardings=out)
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("name", "share"), [("clip", 8), ("siglip", 8), ("nclip", 4)])
def test_memory_of_chunks(name, share):
    """Of b, e and k as on a pod."""
    mesh = make_mesh({"data": 8, "fsdp": 1, "model": 1})

    def shape(where, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where(mesh))

    if name == "nclip":
        args = [shape(batch_sharding, 4096, 256), shape(replicated, 256, 32768), shape(replicated, 32768)] * 2

        def loss(*x, chunk):
            return noncontrastive.nclip(FactoredLogits(*x[:3]), FactoredLogits(*x[3:]), chunk=chunk)
    else:
        args = [shape(batch_sharding, 8192, 64)] * 2 + [shape(replicated)] * (1 if name == "clip" else 2)
        loss = getattr(contrastive, name)
    whole, chunked = (temporaries(functools.partial(loss, chunk=n), *args) for n in (0, 256))
    assert chunked <= whole / share
