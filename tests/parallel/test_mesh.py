import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from xclip_jax.core.errors import UserError
from xclip_jax.parallel.mesh import AXES, batch_part, batch_parts, check_batch, make_mesh, ring_order


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int
    device_kind: str = "fake"
    platform: str = "cpu"
    slice_index: int = 0
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def mesh(data, fsdp, model, processes):
    devices = [Device(i, process) for i, process in enumerate(processes)]
    grid = np.array(devices, dtype=object).reshape(data, fsdp, model)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("sizes", "processes", "parts"),
    [
        ((2, 1, 1), [0, 1], {0: 0, 1: 1}),
        ((1, 1, 2), [0, 1], {0: 0, 1: 0}),
        ((2, 1, 2), [0, 1, 2, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
        ((1, 2, 2), [0, 1, 2, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
        ((1, 1, 4), [0, 1, 2, 3], {0: 0, 1: 0, 2: 0, 3: 0}),
        ((4, 1, 2), [0, 0, 0, 0, 1, 1, 1, 1], {0: 0, 1: 1}),
        ((2, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
        # Hosts of 2 x 2 chips in a torus: rows need not lie together, nor in the order of the processes.
        ((4, 2, 1), [1, 1, 0, 0, 1, 1, 0, 0], {0: 1, 1: 0}),
    ],
)
def test_processes_load_equal_parts_of_the_batch(sizes, processes, parts):
    found = batch_parts(mesh(*sizes, processes))
    assert {process: part.number for process, part in found.items()} == parts
    shards = sizes[0] * sizes[1]
    assert sorted(shard for part in set(found.values()) for shard in part.shards) == list(range(shards))
    assert {part.count for part in found.values()} == {len(set(parts.values()))}


def test_rows_of_a_process_need_not_lie_together():
    found = batch_parts(mesh(4, 2, 1, [1, 1, 0, 0, 1, 1, 0, 0]))
    assert found == {0: (1, 2, (2, 3, 6, 7)), 1: (0, 2, (0, 1, 4, 5))}


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ((3, 1, 2), [0, 0, 0, 1, 1, 1]),  # row 1 of three is on both processes
        ((2, 1, 2), [0, 0, 0, 1]),  # of different numbers of devices
    ],
)
def test_a_batch_that_cannot_be_loaded_in_equal_parts_is_refused(sizes, processes):
    message = rf"mesh data={sizes[0]}, fsdp=1, model=2 splits the batch unevenly over 2 processes.*mesh\.model"
    with pytest.raises(UserError, match=message):
        check_batch(12, mesh(*sizes, processes))


def test_devices_of_hosts_are_no_slices_but_on_tpus():
    def devices(platform):
        return [Device(i, i // 4, platform=platform, slice_index=i // 4) for i in range(8)]

    sizes = {"data": 1, "fsdp": 8, "model": 1}
    assert make_mesh(sizes, devices("gpu")).shape["fsdp"] == 8
    with pytest.raises(UserError, match="data=1 must be a multiple of the 2 slices"):
        make_mesh(sizes, devices("tpu"))


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ((-1, 3, 1), "the product of the other sizes, 3, must divide 8"),
        ((-1, 2, 8), "the product of the other sizes, 16, must divide 8"),
        ((-1, -1, 1), "only one size may be -1"),
        ((3, 1, 1), "the sizes of data, fsdp, model must multiply to 8; set one of them to -1 for the rest"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_remedy(sizes, remedy):
    with pytest.raises(UserError, match=rf"does not fit 8 devices: {remedy}\.$"):
        make_mesh(dict(zip(AXES, sizes, strict=True)), [Device(i, 0) for i in range(8)])


def test_one_process_loads_all():
    assert batch_part(make_mesh({"data": 4, "fsdp": 1, "model": 2})) == (0, 1, (0, 1, 2, 3))
    assert jax.process_count() == 1


def chips(grid, cores=1, slices=1):
    places = itertools.product(range(slices), *map(range, grid), range(cores))
    return [Device(i, 0, "fake", "tpu", piece, tuple(coords), core) for i, (piece, *coords, core) in enumerate(places)]


def longest_hops(devices, shape=None):
    """Steps from each shard to the next in the ring, the most first; every model column takes its own."""
    grid = np.array(devices, dtype=object).reshape(shape or (len(devices), 1, 1))
    order = ring_order(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3))
    shards = grid.reshape(-1, grid.shape[2])
    assert sorted(order) == list(range(len(shards)))
    places = [
        [(device.slice_index, *device.coords, device.core_on_chip) for device in shards[shard]] for shard in order
    ]
    return sorted(np.abs(np.subtract(places, np.roll(places, 1, axis=0))).sum(2).max(1), reverse=True)


@pytest.mark.parametrize("grid", [(2, 1, 1), (2, 2, 1), (2, 4, 1), (8, 16, 1), (3, 4, 1), (2, 2, 4), (4, 4, 8)])
def test_a_ring_runs_from_chip_to_neighbouring_chip(grid):
    assert set(longest_hops(chips(grid))) == {1}
    assert set(longest_hops(np.random.default_rng(0).permutation(chips(grid)))) == {1}


def test_a_ring_of_cores_slices_and_columns_of_a_model_axis():
    assert set(longest_hops(chips((2, 2, 1), cores=2))) == {1}
    assert set(longest_hops(chips((2, 4, 1), slices=2), (4, 4, 1))) == {1}
    assert longest_hops(chips((4, 4, 1)), (4, 2, 2))[0] == 2  # the columns are two chips apart along one axis


def test_a_ring_on_what_has_none():
    assert longest_hops(chips((3, 3, 1)))[:2] == [4, 1]
    incomplete = chips((2, 2, 1))[:3]
    assert ring_order(Mesh(np.array(incomplete).reshape(3, 1, 1), AXES)) == [0, 1, 2]
    assert ring_order(mesh(4, 1, 2, [0] * 8)) == [0, 1, 2, 3]
