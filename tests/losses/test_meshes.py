"""Losses on the meshes of `jax.make_mesh`: axes of any type, and `jax.shard_map`, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers.util import assert_close
from tests.losses.test_contrastive import embeddings
from xclip_jax import losses
from xclip_jax.losses.noncontrastive import effective_rank
from xclip_jax.parallel.sharding import FactoredLogits

ROWS = PartitionSpec("data")
KERNEL = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
LOSSES = {
    "clip": lambda img, txt, scale, keys: losses.clip(img, txt, scale),
    "clip, keys": lambda img, txt, scale, keys: losses.clip(img, txt, scale, keys=keys, label_smoothing=0.1),
    "clip, chunk": lambda img, txt, scale, keys: losses.clip(img, txt, scale, chunk=4),
    "siglip": lambda img, txt, scale, keys: losses.siglip(img, txt, scale, -10.0),
    "siglip, keys, chunk": lambda img, txt, scale, keys: losses.siglip(img, txt, scale, -10.0, keys=keys, chunk=4),
    "nclip": lambda img, txt, scale, keys: losses.nclip(scale * img, scale * txt),
    "nclip, chunk": lambda img, txt, scale, keys: losses.nclip(
        *(FactoredLogits(scale * z, jnp.asarray(KERNEL), jnp.zeros(24)) for z in (img, txt)), chunk=4
    ),
}
MESHES = {
    "explicit": ((4, 2), ("data", "model")),
    "explicit and auto": ((4, 2), ("data", "model"), (AxisType.Explicit, AxisType.Auto)),
    "auto": ((8,), ("data",), (AxisType.Auto,)),
}


def gradients(name):
    return jax.value_and_grad(LOSSES[name], (0, 1, 2), has_aux=True)


@functools.cache
def on_one_device(name):
    return jax.jit(gradients(name))(*arguments())


def arguments(mesh=None):
    """Embeddings, scale and keys; rows are split over "data" of a mesh."""
    z_img, z_txt = (jnp.asarray(z, jnp.float32) for z in embeddings(16, 8))
    rows = [z_img, z_txt, jnp.arange(16) // 3]
    if mesh:
        rows = [jax.device_put(x, NamedSharding(mesh, ROWS)) for x in rows]
    return rows[0], rows[1], jnp.float32(5.0), rows[2]


def assert_same(actual, expected):
    (loss, metrics), grads = jax.device_get(actual)
    (loss_1, metrics_1), grads_1 = jax.device_get(expected)
    assert loss == pytest.approx(loss_1, rel=1e-5)
    assert_close(list(metrics.values()), [metrics_1[key] for key in metrics], 1e-5)
    assert_close(grads, grads_1, 1e-5)


@pytest.mark.parametrize(
    ("name", "mesh_name"),
    [*((name, "explicit") for name in LOSSES), ("clip, keys", "explicit and auto"), ("nclip, chunk", "auto")],
)
def test_one_device_equals_a_mesh(name, mesh_name):
    mesh = jax.make_mesh(*MESHES[mesh_name])
    assert_same(jax.jit(gradients(name))(*arguments(mesh)), on_one_device(name))


def test_explicit_axes_without_jit():
    loss, _ = LOSSES["clip"](*arguments(jax.make_mesh(*MESHES["explicit"])))
    assert float(loss) == pytest.approx(float(on_one_device("clip")[0][0]), rel=1e-5)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_effective_rank_on_explicit_axes(shape):
    h = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rank = jax.jit(effective_rank)(jax.device_put(h, NamedSharding(jax.make_mesh(*MESHES["explicit"]), ROWS)))
    assert float(rank) == pytest.approx(float(effective_rank(jnp.asarray(h))), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "mesh_name", "inside"),
    [*((name, "explicit", True) for name in LOSSES if "," in name), ("clip", "auto", False)],
)
def test_one_device_equals_shard_map(name, mesh_name, inside):
    """As the docstring of `losses` has it, with the gradient computed inside or outside of `jax.shard_map`."""
    mesh = jax.make_mesh(*MESHES[mesh_name])

    def of_rows(img, txt, scale, keys):
        img, txt, keys = jax.lax.all_gather((img, txt, keys), "data", tiled=True)
        return jax.lax.pmean(LOSSES[name](img, txt, scale, keys), "data")

    def mapped(function, out_specs):
        in_specs = (ROWS, ROWS, PartitionSpec(), ROWS)
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    if inside:
        grads = jax.value_and_grad(of_rows, (0, 1, 2), has_aux=True)
        step = mapped(grads, (PartitionSpec(), (ROWS, ROWS, PartitionSpec())))
    else:
        step = jax.value_and_grad(mapped(of_rows, PartitionSpec()), (0, 1, 2), has_aux=True)
    assert_same(jax.jit(step)(*arguments(mesh)), on_one_device(name))
