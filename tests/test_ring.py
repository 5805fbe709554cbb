"""The ring against the plain losses, which define it: values, metrics, gradients, ties, and memory."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.logits import FactoredLogits
from xclip_jax.losses import contrastive, noncontrastive, ring
from xclip_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from xclip_jax.parallel.sharding import MeshLayout, layout_scope

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
MIB = 2**20


def mesh_of(data, fsdp, model):
    return make_mesh({"data": data, "fsdp": fsdp, "model": model})


def features(b=16, e=12, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(2, b, e))
    return jnp.asarray(found / np.linalg.norm(found, axis=-1, keepdims=True), dtype)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(("name", "scalars"), [("softmax", (14.0,)), ("softmax", (100.0,)), ("sigmoid", (10.0, -10.0))])
def test_value_metrics_and_gradients(sizes, name, scalars):
    z_img, z_txt = features()
    plain = getattr(contrastive, name)
    round_trip = partial(getattr(ring, name), mesh=mesh_of(*sizes))
    args = (z_img, z_txt, *map(jnp.float32, scalars))
    every = tuple(range(len(args)))
    (loss_1, metrics_1), grads_1 = jax.jit(jax.value_and_grad(plain, every, has_aux=True))(*args)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(round_trip, every, has_aux=True))(*args)
    assert loss == pytest.approx(float(loss_1), rel=1e-6)
    chex.assert_trees_all_close(metrics, metrics_1, rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in grads_1)
    chex.assert_trees_all_close(grads, grads_1, rtol=1e-5, atol=2e-6 * largest)


def test_ties_go_to_the_lowest_index():
    z_img, z_txt = features(b=16)
    # Texts 3 and 11 are one text: image 3 is right, image 11 is not.
    z_txt = z_txt.at[11].set(z_txt[3])
    z_img = z_img.at[3].set(z_txt[3]).at[11].set(z_txt[3])
    _, plain = contrastive.softmax(z_img, z_txt, 20.0)
    _, found = jax.jit(partial(ring.softmax, mesh=mesh_of(8, 1, 1)))(z_img, z_txt, 20.0)
    assert float(found["acc_img"]) == float(plain["acc_img"])
    assert float(found["acc_txt"]) == float(plain["acc_txt"])


def test_perfect_pairs_keep_their_small_loss():
    z = features(e=4)[0]
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
    assert found <= 60 * MIB
    assert plain > 100 * MIB


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
