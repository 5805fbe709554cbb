"""Which process reads which part of a checkpoint, so that each byte leaves the storage once.

With every strategy some arrays are whole on each host. If all hosts read them, a bucket serves the state as many times
as the run has hosts. Each reads its part instead, and the devices exchange the parts over their own network, which is
faster; between slices each part travels once.
"""

import math
import warnings
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

_ELEMENTS = 1 << 14  # smaller arrays are read whole by all: their bytes are nothing, and each takes a collective


def parts(abstract: Any) -> Any:
    """`abstract` arrays in the shardings that they are read in: large ones split over all devices of all processes."""
    layout = jax.tree.leaves(abstract)[0].sharding
    if not isinstance(layout, NamedSharding) or not _spans_processes(layout):
        return abstract
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_split(x, x.sharding)), abstract)


def gather(arrays: Any, abstract: Any) -> Any:
    """`arrays` that were read as `parts(abstract)`, in the shardings of `abstract`."""
    read, structure = jax.tree.flatten(arrays)
    layouts = [x.sharding for x in jax.tree.leaves(abstract)]
    split = [i for i, (x, layout) in enumerate(zip(read, layouts, strict=True)) if x.sharding != layout]
    if not split:
        return arrays
    with warnings.catch_warnings():
        # The parts are given up, as they might not fit beside the result; they are smaller than what they become.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        gather = jax.jit(lambda x: x, out_shardings=[layouts[i] for i in split], donate_argnums=0)
        whole = gather([read[i] for i in split])
    for i, x in zip(split, whole, strict=True):
        read[i] = x
    return structure.unflatten(read)


def _spans_processes(layout: NamedSharding) -> bool:
    return len({device.process_index for device in layout.mesh.devices.flat}) > 1


def _split(x: jax.ShapeDtypeStruct, layout: NamedSharding) -> NamedSharding:
    """`layout` split further, over all mesh axes that it does not use.

    Orbax writes copies of an array in parts, along the first dimension that their number divides, and it reads whole
    parts: along another dimension each process would read all of them.
    """
    spec = [_axes(part) for part in (*layout.spec, *[None] * (len(x.shape) - len(layout.spec)))]
    free = tuple(axis for axis in layout.mesh.axis_names if all(axis not in part for part in spec))
    copies = math.prod(layout.mesh.shape[axis] for axis in free)
    if copies == 1 or math.prod(x.shape) < _ELEMENTS:
        return layout
    for i, size in enumerate(layout.shard_shape(x.shape)):
        if size % copies == 0:
            spec[i] += free
            return NamedSharding(layout.mesh, PartitionSpec(*(part or None for part in spec)))
    return layout


def _axes(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())
