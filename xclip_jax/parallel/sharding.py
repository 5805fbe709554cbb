"""The mesh axis of each logical axis, by strategy. Models name logical axes; only this file knows their layout.

    dp       every parameter on every device; gradients are summed once
    zero1    dp, with the optimizer's moments (and the moving average) split over all batch shards, or over one batch
             axis if all shards do not divide an array
    fsdp     kernels of matrix products split over "fsdp", and gathered before use
    fsdp_tp  fsdp, with heads and MLPs also split over "model"

Every strategy splits the clusters of nCLIP's heads over all devices, since their last kernels are the largest matrices:
each device computes the logits of its clusters for the gathered rows of the whole batch. If that sends more rows than a
kernel has columns, or the devices do not divide the clusters, each device computes the logits of its rows instead.
Clusters are then split over "model", and rows of the last kernel over all batch shards (zero1) or "fsdp" (fsdp and
fsdp_tp).

Embeddings of words and positions stay whole: splitting their features would make XLA reshard all later activations.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xclip_jax.core.console import setting
from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, choice, key
from xclip_jax.parallel.mesh import AXES, BATCH_AXES, batch_shards, num_slices

Rules = Mapping[str, str | tuple[str, ...] | None]
# "row" is the batch of cluster logits. Axes without a rule are never split: kv, layers, norm, patch, table, vocab.
_DP = {"batch": BATCH_AXES, "row": BATCH_AXES, "cluster": "model"}
_FSDP = _DP | {"embed": "fsdp", "hidden": "fsdp"}
RULES: Mapping[str, Rules] = {
    "dp": _DP,
    "zero1": _DP | {"hidden": BATCH_AXES},
    "fsdp": _FSDP,
    "fsdp_tp": _FSDP | {"mlp": "model", "heads": "model"},
}
_CLUSTERS_SPLIT: Rules = {"row": None, "hidden": None, "cluster": AXES}
# zero1 does not split smaller moments: their bytes are negligible, and each split array needs a collective.
ZERO1_ELEMENTS = 1 << 14

Axes = tuple[str | None, ...]
_SIZE = Check("a positive number, or -1 for the rest of the devices", lambda value: value == -1 or value >= 1)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Config group `mesh`: axis sizes of the device mesh, and the layout over them."""

    data: int = key(-1, "copies of the model, each with a share of the batch", _SIZE)
    fsdp: int = key(1, "shards of the batch and, by strategy, of parameters (fsdp) or moments (zero1)", _SIZE)
    model: int = key(1, "devices that share clusters and, with fsdp_tp, heads and MLPs", _SIZE)
    strategy: str = key("dp", "arrays to split in addition to the batch", choice(RULES))


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh and how arrays are split over it."""

    mesh: Mesh
    strategy: str  # one of `RULES`
    clusters_split: bool = False  # whether clusters, and not the rows of their logits, are split over all devices
    manual: tuple[str, ...] = ()  # mesh axes over which `map_microbatches` has already split the rows

    @property
    def rules(self) -> Rules:
        """The mesh axes of each logical axis."""
        return {**RULES[self.strategy], **(_CLUSTERS_SPLIT if self.clusters_split else {})}


def make_layout(boxed: Any, mesh: Mesh, strategy: str, batch: int) -> MeshLayout:
    """Return the layout of a model, with clusters split over all devices if that does not increase traffic.

    A split sends batch x hidden numbers twice; otherwise hidden x clusters numbers travel, divided by the size of axis
    "model". `boxed` is a tree of logically named abstract arrays, and `batch` the size of the global batch.
    """
    arrays = zip(jax.tree.leaves(nn.unbox(boxed)), jax.tree.leaves(nn.get_partition_spec(boxed)), strict=True)
    clusters = {size for x, names in arrays for name, size in zip(names, x.shape, strict=False) if name == "cluster"}
    fits = all(k % mesh.size == 0 and batch * mesh.shape["model"] <= k for k in clusters)
    return MeshLayout(mesh, strategy, clusters_split=bool(clusters) and fits)


_active: contextvars.ContextVar[MeshLayout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def layout_scope(layout: MeshLayout) -> Iterator[None]:
    """Context in which `constrain` and `map_microbatches` apply `layout`."""
    with setting(_active, layout):
        yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain `x` to the layout of its logical `axes`; outside of `layout_scope`, return `x`.

    Blocks constrain their inputs and outputs. Otherwise XLA would propagate the split of a kernel to the features of
    activations, which costs more than gathering the kernel.
    """
    layout = _active.get()
    if layout is None:
        return x
    spec = _spec(layout, axes)
    return jax.lax.with_sharding_constraint(x, spec if layout.manual else NamedSharding(layout.mesh, spec))


def _spec(layout: MeshLayout, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(_without(layout.rules.get(axis or ""), layout.manual) for axis in axes))


def _without(part: str | tuple[str, ...] | None, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    parts = (part,) if isinstance(part, str) else part or ()
    return tuple(axis for axis in parts if axis not in axes) or None


def platform() -> str:
    """Return the platform of the current mesh, such as "tpu"; "" outside of `layout_scope`."""
    layout = _active.get()
    return layout.mesh.devices.flat[0].platform if layout else ""


def device() -> jax.Device | None:
    """Return a local device of the current mesh; None outside of `layout_scope`."""
    layout = _active.get()
    devices = layout.mesh.devices.flat if layout else ()
    return next((d for d in devices if d.process_index == jax.process_index()), None)


def shards_of(axis: str) -> int:
    """Return the number of shards of a dimension with logical `axis`, within `map_microbatches` of a device's part."""
    layout = _active.get()
    if layout is None:
        return 1
    return math.prod(layout.mesh.shape[name] for name in _without(layout.rules.get(axis), layout.manual) or ())


def map_devices(
    fn: Callable[..., jax.Array], arrays: tuple[Any, ...], axes: tuple[Axes, ...], result: Axes
) -> jax.Array:
    """Compute `fn`, for example a kernel that XLA cannot split, on each device's part of `arrays`.

    `axes` are the logical axes of each array, () for a tree of arrays that each device needs whole, and `result` the
    result's.
    """
    layout = _active.get()
    if layout is None:
        return fn(*arrays)
    return jax.shard_map(
        fn,
        mesh=None if layout.manual else layout.mesh,
        in_specs=tuple(_spec(layout, names) for names in axes),
        out_specs=_spec(layout, result),
        axis_names=set(layout.mesh.axis_names) - set(layout.manual),
        check_vma=False,
    )(*arrays)


def map_microbatches(
    fn: Callable[[Any, Any], Any], shared: Any, rows: Any, microbatches: int, *, clusters: bool = False
) -> Any:
    """Compute fn(shared, microbatch of rows) for each of `microbatches` equal microbatches, one after another.

    Intermediate values of only one microbatch are in memory at a time, also in the backward pass, which recomputes
    them. Each device sums gradients of `shared` over microbatches before devices sum them.

    Args:
      fn: function of `shared` and arrays with a microbatch as their first dimension.
      shared: a tree of arrays independent of the batch.
      rows: a tree of arrays with the global batch as their first dimension.
      microbatches: number of microbatches; each has rows of every device, so that none is idle.
      clusters: whether `fn` sums over cluster logits. Results are then stacked, one per microbatch and device, or one
        per microbatch if clusters are split over all devices, each with its clusters of all rows. Otherwise results
        have the microbatch's rows, and are returned in the order of the batch.
    """
    layout = _active.get()

    def local(shared: Any, rows: Any) -> Any:
        # Row i goes to microbatch i % microbatches, so that each has rows of every device.
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1), rows
        )
        results = jax.lax.map(jax.checkpoint(lambda part: fn(shared, part)), parts)
        return results if clusters else jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)

    if layout is None or (clusters and layout.clusters_split):
        return local(shared, rows)
    # Axes with split parameters are left to XLA, which gathers parameters block by block.
    split = RULES[layout.strategy].values()
    manual = tuple(axis for axis in BATCH_AXES if axis not in split and layout.mesh.shape[axis] > 1)
    if not manual:
        return local(shared, rows)

    def on_device(shared: Any, rows: Any) -> Any:
        with layout_scope(dataclasses.replace(layout, manual=manual)):
            return local(shared, rows)

    # Unchecked, JAX sums gradients of `shared` over devices once, after the loop; checked, JAX 0.12 cannot derive erf.
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(manual)),
        out_specs=PartitionSpec(manual),
        axis_names=set(manual),
        check_vma=False,
    )(shared, rows)


def shardings(boxed: Any, layout: MeshLayout) -> Any:
    """Return the unboxed tree of NamedShardings of logically named (boxed) abstract arrays.

    `UserError` if a mesh axis does not divide its dimension.
    """
    mesh = layout.mesh
    specs = nn.get_partition_spec(boxed)
    names = {axis for spec in jax.tree.leaves(specs) for axis in spec if axis}
    shardings_of = nn.logical_to_mesh_sharding(specs, mesh, [(name, layout.rules.get(name)) for name in sorted(names)])
    shapes = nn.unbox(boxed)
    shardings_of = jax.tree.map(_without_batch, shapes, shardings_of)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings_of), strict=True):
        for size, axis in zip(x.shape, sharding.spec, strict=False):
            if isinstance(axis, str) and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh axis {axis!r} of size {mesh.shape[axis]} cannot divide a dimension of {size} of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}; change one of the two."
                )
    return shardings_of


def _without_batch(x: Any, sharding: NamedSharding) -> NamedSharding:
    """Drop splits over all batch shards if they are impossible, or not worth their collectives."""
    shards = batch_shards(sharding.mesh)
    spec = [
        None if part == BATCH_AXES and (size % shards or x.size < ZERO1_ELEMENTS) else part
        for size, part in zip(x.shape, sharding.spec, strict=False)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def zero1_shardings(abstract: Any, specs: Any, mesh: Mesh) -> Any:
    """Split every large array of `specs` over all batch shards, along its largest dimension that they divide.

    If they divide none, split it over the longer batch axis that divides one. Any dimension will do for the elementwise
    work on moments, averages and their gradients. On several TPU slices the axis "fsdp" comes first if it spans a
    slice, so that gathers in each step stay within the slice.
    """
    longest_first = sorted(((axis,) for axis in BATCH_AXES), key=lambda axes: -mesh.shape[axes[0]])
    choices = [(axes, math.prod(mesh.shape[axis] for axis in axes)) for axes in (BATCH_AXES, *longest_first)]
    if 1 < num_slices(list(mesh.devices.flat)) == mesh.shape["data"]:
        choices.insert(0, (("fsdp",), mesh.shape["fsdp"]))

    def split(x: Any, sharding: NamedSharding) -> NamedSharding:
        spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        if x.size < ZERO1_ELEMENTS or any(part in (BATCH_AXES, AXES) for part in spec):
            return sharding
        for axes, shards in choices:
            free = [i for i in range(x.ndim) if spec[i] is None and x.shape[i] % shards == 0]
            if shards > 1 and free:
                spec[max(free, key=lambda i: x.shape[i])] = axes
                return NamedSharding(mesh, PartitionSpec(*spec))
        return sharding

    return jax.tree.map(split, abstract, specs)


def argmax(logits: jax.Array, axis: int) -> jax.Array:
    """Return the index of the first largest value along `axis`; the axis size if a value is NaN.

    On a split axis `jnp.argmax` sends pairs of value and index between all devices; two reductions do not.
    """
    logits = jax.lax.stop_gradient(logits)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    largest = logits == jnp.max(logits, axis=axis, keepdims=True)
    return jnp.min(jnp.where(largest, index, logits.shape[axis]), axis=axis)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply factors of lower precision into an fp32 product; gradients are computed in the factors' precision.

    The default gradient multiplies fp32 by bf16, and devices sum the kernel's gradient in fp32, at twice the traffic.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(jnp.matmul, *factors)[1](gradient.astype(factors[0].dtype))


_product.defvjp(_product_forward, _product_backward)


@flax.struct.dataclass
class FactoredLogits:
    """Factors of cluster logits (b, k) = x @ kernel + bias, so that a loss can compute them in chunks.

    The product has the dtype of x (b, d); kernel (d, k) and bias (k,) are fp32.
    """

    x: jax.Array
    kernel: jax.Array
    bias: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(b, k)."""
        return self.x.shape[0], self.kernel.shape[1]

    def logits(self) -> jax.Array:
        """Compute the logits, with fp32 sums also of bf16 factors; if clusters are split, devices gather x first."""
        x = constrain(self.x, "row", None)
        product = jnp.matmul if x.dtype == jnp.float32 else _product
        return constrain(product(x, self.kernel.astype(x.dtype)), "row", "cluster") + self.bias


Logits = jax.Array | FactoredLogits
