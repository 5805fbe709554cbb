"""Kinds of TPUs with their published figures, and topologies of TPUs that need not exist."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from jax.experimental import topologies

from xclip_jax.core.errors import UserError, check_choice, check_count

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU; memory, peak, bandwidth, clock and network describe one device.

    Source: docs.cloud.google.com/tpu/docs, the page of each version. The clock follows from the peak and the
    multiplications that the matrix units start in a cycle.
    """

    memory: float  # bytes
    peak: float  # bf16 FLOP/s
    bandwidth: float  # memory bandwidth, bytes/s
    clock: float  # cycles/s
    kernels: float  # share of the peak that the attention kernel reaches by its schedule, `benchmarks.kernel`
    link: float  # bytes/s of a link between chips, in one direction
    network: float  # bytes/s between slices; v4 has no published figure and takes v5p's
    wraps: int  # length from which an axis of the grid is a ring, 0 if all are when all are multiples of 4
    smallest: str  # smallest topology
    cores: int = 1  # cores of a device, which share its work
    devices: int = 1  # JAX devices of a chip
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def ici(self, grid: tuple[int, ...]) -> float:
        """Bytes/s that each chip of a slice can send to others; a chip in a corner has the fewest links."""
        cubes = not self.wraps and not any(n % 4 for n in grid)
        return self.link * sum(2 if cubes or n == self.wraps else 1 for n in grid if n > 1)


_MEGACORE = {"chip_config_name": "megacore"}  # two cores that are one device
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 1.05e9, 0.4, 45e9, 50e9 / 8, 0, "v4:2x2x1", 2, options=_MEGACORE),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 1.5e9, 0.38, 50e9, 25e9 / 8, 16, "v5e:2x2"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 1.75e9, 0.4, 100e9, 50e9 / 8, 0, "v5p:2x2x1", 2, options=_MEGACORE),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 1.75e9, 0.11, 100e9, 100e9 / 8, 16, "v6e:2x2"),
    # A chip is two devices, each with half of the memory.
    "tpu7x": Chip(96 * GIB, 2307e12 / 2, 7380e9 / 2, 2.2e9, 0.11, 100e9, 50e9 / 8, 0, "tpu7x:2x2x1", devices=2),
}


def grid_of(topology: str) -> tuple[str, tuple[int, ...]]:
    """Return chip and grid of a topology such as "v5e:4x8"; `UserError` for another form or an unknown chip."""
    chip, _, grid = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UserError(f"--topology is {topology!r}; write CHIP:GRID, such as v5e:4x8 for 32 chips of v5e.")
    check_choice("--topology's chip", chip, CHIPS)
    return chip, tuple(map(int, grid.split("x")))


def devices_of(topology: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """Return devices of a topology such as "v5e:4x8", which need not exist, and their kind.

    Raises:
      UserError: an unknown chip, a grid that the chip does not come in, slices below 1, or no libtpu.
    """
    check_count("--slices", slices, 1)
    chip, _ = grid_of(topology)
    # libtpu looks for a TPU's metadata server, and lets one process of a machine in, unless these variables allow more.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # it says on stderr that it finds none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for TPUs needs libtpu: pip install 'xclip_jax[tpu]'")
    options = dict(CHIPS[chip].options) | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices, CHIPS[chip]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology={topology!r} is none that {chip} comes in ({reason}).") from error
