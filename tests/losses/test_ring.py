"""The ring against the plain losses, which define it: values, metrics, gradients, ties, memory, and how it is sent."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.commands import plan
from xclip_jax.losses import contrastive, noncontrastive, ring
from xclip_jax.parallel import compiler
from xclip_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from xclip_jax.parallel.sharding import FactoredLogits, MeshLayout, layout_scope

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
MIB = 2**20
LOSSES = [
    ("softmax", {}, (14.0,)),
    ("softmax", {}, (100.0,)),
    ("softmax", {"label_smoothing": 0.1}, (14.0,)),
    ("softmax", {"q": 0.7}, (14.0,)),
    ("softmax", {"q": 1e-6}, (14.0,)),
    ("softmax", {"q": 0.4}, (100.0,)),
    ("sigmoid", {}, (10.0, -10.0)),
    ("sigmoid", {}, (100.0, 5.0)),
]


def mesh_of(data, fsdp, model):
    return make_mesh({"data": data, "fsdp": fsdp, "model": model})


def features(b=96, e=12, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, b, e))
    return jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), dtype)


def assert_same(name, args, mesh, **options):
    """Value, metrics and all gradients of the ring and of the plain loss; the weight of the loss is not 1."""
    every, results = tuple(range(len(args))), []
    for loss in (partial(getattr(contrastive, name), **options), partial(getattr(ring, name), mesh=mesh, **options)):

        def weighted(*args, loss=loss):
            value, metrics = loss(*args)
            return 3 * value, metrics

        results.append(jax.jit(jax.value_and_grad(weighted, every, has_aux=True))(*args))
    ((loss_1, metrics_1), grads_1), ((loss, metrics), grads) = results
    assert loss == pytest.approx(float(loss_1), rel=1e-6)
    chex.assert_trees_all_close(metrics, metrics_1, rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in grads_1)
    chex.assert_trees_all_close(grads, grads_1, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize(("name", "options", "scalars"), LOSSES)
def test_pairs_with_equal_keys_are_positives(name, options, scalars):
    keys = jnp.asarray(np.random.default_rng(1).integers(0, 60, (96, 2)) // [1, 60])
    assert_same(name, (*features(), *map(jnp.float32, scalars)), mesh_of(4, 2, 1), keys=keys, **options)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(("name", "options", "scalars"), LOSSES)
def test_value_metrics_and_gradients(sizes, name, options, scalars):
    args = (*features(), *map(jnp.float32, scalars))
    assert_same(name, args, mesh_of(*sizes), **options)


@pytest.mark.parametrize(("name", "options", "scalars"), LOSSES)
def test_any_order_of_the_ring(name, options, scalars, monkeypatch):
    """On TPUs a ring runs along the grid of chips and not in the order of the batch."""
    monkeypatch.setattr(ring, "ring_order", lambda mesh: [0, 5, 3, 7, 6, 1, 4, 2])
    z_img, z_txt = features()
    z_txt = z_txt.at[70].set(z_txt[3]).at[15].set(z_txt[80])  # ties, in either order of shards
    z_img = z_img.at[jnp.array([3, 15, 70, 80])].set(z_txt[jnp.array([3, 15, 70, 80])])
    assert_same(name, (z_img, z_txt, *map(jnp.float32, scalars)), mesh_of(4, 2, 1), **options)


@pytest.mark.parametrize(("name", "e", "scalars"), [("softmax", 5, (100.0,)), ("sigmoid", 48, (100.0, -50.0))])
def test_identical_pairs_at_a_large_scale_against_float64(name, e, scalars):
    """The loss is far below the logits, of which rounding in float32 is 1e-5."""
    z = features(e=e)[0]
    wide = np.asarray(z, np.float64)
    logits = scalars[0] * wide @ wide.T + sum(scalars[1:])
    if name == "softmax":
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        expected, weights = -np.log(np.diag(p)).mean(), (p + p.T) / 2 - np.eye(96)
    else:
        sign = 2 * np.eye(96) - 1
        expected, weights = np.logaddexp(0, -sign * logits).sum() / 96, -sign / (1 + np.exp(sign * logits))
    loss = partial(getattr(ring, name), mesh=mesh_of(8, 1, 1))
    args = (z, z, *map(jnp.float32, scalars))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)
    weights /= 96
    assert 1e-3 < expected < 0.1
    assert float(value) == pytest.approx(expected, rel=3e-5)
    by_z = scalars[0] * weights @ wide, scalars[0] * weights.T @ wide
    for grad, exact in zip(grads, (*by_z, (weights * (wide @ wide.T)).sum()), strict=True):
        np.testing.assert_allclose(grad, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_a_number_that_is_none_reaches_loss_and_gradients():
    z_img, z_txt = features()
    loss = partial(ring.softmax, mesh=mesh_of(8, 1, 1))
    (value, _), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(z_img.at[40, 0].set(jnp.nan), z_txt, 14.0)
    assert jnp.isnan(value) and jnp.isnan(grad[40]).all()


@pytest.mark.parametrize(("first", "second"), [(3, 11), (11, 3), (0, 1)])
def test_ties_go_to_the_lowest_index(first, second):
    z_img, z_txt = features(b=16)
    # Two texts are one, of two shards or of one shard; the image of the lower index is right, the other is not.
    z_txt = z_txt.at[second].set(z_txt[first])
    z_img = z_img.at[first].set(z_txt[first]).at[second].set(z_txt[first])
    _, plain = contrastive.softmax(z_img, z_txt, 20.0)
    _, metrics = jax.jit(partial(ring.softmax, mesh=mesh_of(8, 1, 1)))(z_img, z_txt, 20.0)
    assert float(metrics["acc_img"]) == float(plain["acc_img"])
    assert float(metrics["acc_txt"]) == float(plain["acc_txt"])


def test_perfect_pairs_keep_their_small_loss():
    z = features(b=16, e=4)[0]
    expected, _ = contrastive.softmax(z, z, 40.0)
    found, _ = jax.jit(partial(ring.softmax, mesh=mesh_of(8, 1, 1)))(z, z, 40.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert 0 < float(found) < 0.1


def test_low_precision_embeddings_are_compared_in_fp32():
    z_img, z_txt = features(dtype=jnp.bfloat16)
    expected, _ = contrastive.softmax(z_img, z_txt, 14.0)
    found, _ = jax.jit(partial(ring.softmax, mesh=mesh_of(8, 1, 1)))(z_img, z_txt, 14.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("bad", [(features()[0], features(b=8)[0], 1.0), (features()[0], features()[1], jnp.ones(2))])
def test_shapes_are_checked(bad):
    with pytest.raises(AssertionError):
        ring.softmax(*bad, mesh=mesh_of(8, 1, 1))


# --- memory, as the compiler plans it; b, e and k as on a pod


def temporaries(fn, *args):
    """Bytes of temporaries on each of eight devices for the value and all gradients of `fn`."""
    mesh = mesh_of(8, 1, 1)
    out = ((replicated(mesh), replicated(mesh)), tuple(x.sharding for x in args))
    with layout_scope(MeshLayout(mesh, "dp")):
        step = jax.jit(jax.value_and_grad(fn, tuple(range(len(args))), has_aux=True), out_shardings=out)
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_memory_of_the_ring(name):
    mesh = mesh_of(8, 1, 1)
    z = jax.ShapeDtypeStruct((8192, 512), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    args = (z, z, scalar) if name == "softmax" else (z, z, scalar, scalar)
    plain = temporaries(getattr(contrastive, name), *args)
    found = temporaries(partial(getattr(ring, name), mesh=mesh), *args)
    print(f"{name}, b = 8192, e = 512, 8 devices: plain {plain / MIB:.0f} MiB, ring {found / MIB:.0f} MiB")
    assert found <= 24 * MIB
    assert plain > 100 * MIB


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topology", ["v5e:8x8", "v5p:4x4x4"])
def test_permutes_of_a_tpu_are_sent_during_products(topology, name):
    """And no chip keeps the texts of all hops."""
    pytest.importorskip("libtpu")
    devices, _ = plan.devices_of(topology)
    rows, e = 256, 512
    mesh = make_mesh({"data": len(devices), "fsdp": 1, "model": 1}, list(devices))
    z = jax.ShapeDtypeStruct((rows * len(devices), e), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    args = (z, z, scalar) if name == "softmax" else (z, z, scalar, scalar)
    gradients = jax.value_and_grad(partial(getattr(ring, name), mesh=mesh), tuple(range(len(args))), has_aux=True)
    out = ((replicated(mesh), replicated(mesh)), tuple(x.sharding for x in args))
    options = dict(compiler.options(devices))
    compiled = jax.jit(gradients, out_shardings=out, compiler_options=options).lower(*args).compile()
    program = compiled.as_text()
    assert not re.search(r" collective-permute\(", program)
    loops = [
        re.search(rf"^%{re.escape(body)} .*?^}}", program, re.M | re.S)[0]
        for body in re.findall(r"body=%([\w.-]+)", program)
    ]
    assert len(loops) == 2
    for loop, products in zip(loops, (1, 2), strict=True):
        _, start, rest = loop.partition(" collective-permute-start(")
        meanwhile, done, _ = rest.partition(" collective-permute-done(")
        assert start and done and meanwhile.count('dot_general"') >= products
        assert " collective-permute-start(" not in meanwhile and rest.count(" collective-permute-done(") == 1
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", program))
    assert largest <= (2 * e + 2) * rows
    assert compiled.memory_analysis().peak_memory_in_bytes <= 16 * rows * e * 4


def test_memory_of_nclip_in_chunks():
    mesh = mesh_of(8, 1, 1)
    b, k, d = 4096, 32768, 256
    x = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=batch_sharding(mesh))
    kernel = jax.ShapeDtypeStruct((d, k), jnp.float32, sharding=replicated(mesh))
    bias = jax.ShapeDtypeStruct((k,), jnp.float32, sharding=replicated(mesh))

    def loss(x_img, kernel_img, bias_img, x_txt, kernel_txt, bias_txt, *, chunk):
        s_img, s_txt = FactoredLogits(x_img, kernel_img, bias_img), FactoredLogits(x_txt, kernel_txt, bias_txt)
        return noncontrastive.nclip(s_img, s_txt, chunk=chunk)

    args = (x, kernel, bias) * 2
    whole, chunked = (temporaries(partial(loss, chunk=chunk), *args) for chunk in (0, 256))
    print(f"nCLIP, b = {b}, k = {k}, 8 devices: whole {whole / MIB:.0f} MiB, chunks of 256 {chunked / MIB:.0f} MiB")
    assert chunked <= whole / 4
