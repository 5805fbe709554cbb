"""The device mesh: three axes, "data", "fsdp" and "model"; the batch is split over the first two."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xclip_jax.core.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Make the mesh with `sizes` of `AXES`; one size may be -1, the rest of the devices. Data spans TPU slices."""
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    given = math.prod(n for n in shape if n != -1)
    shape = [len(devices) // given if n == -1 else n for n in shape]
    slices = num_slices(devices)
    if math.prod(shape) != len(devices) or shape[0] % slices:
        raise UserError(
            f"mesh {dict(sizes)} does not fit {len(devices)} devices: sizes must multiply to {len(devices)}, data must "
            f"be a multiple of the number of slices, {slices}, and one size may be -1 for the rest."
        )
    types = (AxisType.Auto,) * len(AXES)  # sharding constraints do not work with the default, Explicit
    # An axis of 8 spans two physical axes in a torus of 4 x 4 x 4.
    split: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(tuple(shape), **split), AXES, axis_types=types)
    # Gradient sums, embeddings and hidden rows of cluster heads cross the data centre's network between slices.
    inside = (shape[0] // slices, *shape[1:])
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), **split), AXES, axis_types=types)


def num_slices(devices: list[jax.Device]) -> int:
    """Return the number of TPU slices; 1 on other platforms, although a GPU's slice_index is the index of its host."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of shards of the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first dimension is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


class BatchPart(NamedTuple):
    """The rows of the global batch on the devices of a process, which it loads.

    The batch has count * len(shards) shards, one for each device along the batch axes.
    """

    number: int  # from 0
    count: int  # number of parts of equal size
    shards: tuple[int, ...]  # ascending; on TPU pods they need not be neighbours


def batch_parts(mesh: Mesh) -> dict[int, BatchPart]:
    """Return {process: its part of the global batch}; equal for processes with the same rows.

    `UserError` if the rows of two processes overlap in part, or differ in number.
    """
    shards = batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).add(index[0].indices(shards)[0])
    shards_of = {process: tuple(sorted(held)) for process, held in sorted(rows.items())}
    parts = sorted(set(shards_of.values()))
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != shards:
        sizes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise UserError(
            f"mesh {sizes} splits the batch unevenly over {len(rows)} processes; choose a mesh.model that divides the "
            "number of devices of a process, or is a multiple of it."
        )
    return {process: BatchPart(parts.index(held), len(parts), held) for process, held in shards_of.items()}


def batch_part(mesh: Mesh) -> BatchPart:
    """Return this process's part of the global batch, see `batch_parts`."""
    return batch_parts(mesh)[jax.process_index()]


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, mesh: Mesh, key: str = "data.batch", microbatches: int = 1) -> None:
    """Raise `UserError` unless the mesh divides each microbatch of `batch` (config key `key`), also by process."""
    batch_parts(mesh)
    shards = batch_shards(mesh)
    if batch % (shards * microbatches):
        parts = f" in {microbatches} microbatches (optim.microbatches)" if microbatches > 1 else ""
        raise UserError(
            f"{key}={batch} cannot be divided{parts} over {shards} devices (mesh axes data x fsdp); use a multiple of "
            f"{shards * microbatches}, or a mesh with fewer of them."
        )
