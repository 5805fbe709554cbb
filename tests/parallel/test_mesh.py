import dataclasses

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from xclip_jax.core.errors import UserError
from xclip_jax.parallel.mesh import AXES, batch_part, batch_parts, check_batch, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
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
        ((1, 1, 2), [0, 1], {0: 0, 1: 0}),
        ((2, 1, 2), [0, 1, 2, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
        ((4, 1, 2), [0, 0, 0, 0, 1, 1, 1, 1], {0: 0, 1: 1}),
        ((2, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
    ],
)
def test_processes_load_equal_parts_of_the_batch(sizes, processes, parts):
    found = batch_parts(mesh(*sizes, processes))
    assert {process: part.number for process, part in found.items()} == parts
    shards = sizes[0] * sizes[1]
    assert sorted(shard for part in set(found.values()) for shard in part.shards) == list(range(shards))
    assert {part.count for part in found.values()} == {len(set(parts.values()))}


def test_rows_of_a_process():
    """Hosts of 2 x 2 chips in a torus: rows need not lie together, nor in the order of the processes."""
    found = batch_parts(mesh(4, 2, 1, [1, 1, 0, 0, 1, 1, 0, 0]))
    assert found == {0: (1, 2, (2, 3, 6, 7)), 1: (0, 2, (0, 1, 4, 5))}
    assert batch_part(make_mesh({"data": 4, "fsdp": 1, "model": 2})) == (0, 1, (0, 1, 2, 3))  # of one process


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ((3, 1, 2), [0, 0, 0, 1, 1, 1]),  # row 1 of three is on both processes
        ((2, 1, 2), [0, 0, 0, 1]),  # of different numbers of devices
    ],
)
def test_a_batch_that_cannot_be_loaded_in_equal_parts_is_refused(sizes, processes):
    with pytest.raises(UserError, match=rf"mesh data={sizes[0]}, fsdp=1, model=2 .*mesh\.model"):
        check_batch(12, mesh(*sizes, processes))


def test_devices_of_hosts_are_no_slices_but_on_tpus():
    def devices(platform):
        return [Device(i, i // 4, platform=platform, slice_index=i // 4) for i in range(8)]

    sizes = {"data": 1, "fsdp": 8, "model": 1}
    assert make_mesh(sizes, devices("gpu")).shape["fsdp"] == 8
    with pytest.raises(UserError, match="a multiple of the number of slices, 2"):
        make_mesh(sizes, devices("tpu"))


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (-1, 2, 8), (-1, -1, 1), (3, 1, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(dict(zip(AXES, sizes, strict=True)), [Device(i, 0) for i in range(8)])
