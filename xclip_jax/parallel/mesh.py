"""The device mesh: three axes, "data", "fsdp" and "model"; the batch is split over the first two."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xclip_jax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `sizes`, one for each of `AXES`; -1 stands for "the rest", at most once.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"mesh {dict(sizes)}: sizes are positive, and at most one of them is -1 (the rest).")
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {dict(sizes)} does not fit {len(devices)} devices: the sizes of {', '.join(AXES)} must multiply to "
            f"{len(devices)}; set one of them to -1 for the rest."
        )
    # Auto axes: linen's logical constraints do not work with the default, Explicit.
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first dimension is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, mesh: Mesh, key: str = "data.batch") -> None:
    """Raises `UserError` unless the mesh's batch axes divide the global `batch`, given by config key `key`."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % shards:
        below = batch // shards * shards
        nearest = f"{below} or {below + shards}" if below else f"{shards}"
        raise UserError(
            f"{key}={batch} cannot be divided over {shards} devices (mesh axes data x fsdp); use {nearest}, "
            f"or a mesh with fewer of them."
        )
