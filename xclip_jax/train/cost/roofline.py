"""Published figures of TPUs, their topologies without hardware, and the estimated time of a step on them.

The time is a model, not a measurement. An operation takes the compiler's estimate of cycles at the chip's clock. A
collective takes the bytes sent by a chip, with the best algorithm on a ring, over the bandwidth of its links.
Operations between its start and its end hide that time; the rest is exposed.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.experimental import topologies

from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.core.imports import import_extra
from xclip_jax.core.storage import unreadable_as
from xclip_jax.train.cost import hlo
from xclip_jax.train.cost.hlo import Execution, Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU; memory, peak, bandwidth, clock and network describe one device.

    Source: docs.cloud.google.com/tpu/docs, the page of each version. The clock follows from the peak and the matrix
    units' multiplications per cycle.
    """

    memory: float  # bytes
    peak: float  # bf16 FLOP/s
    bandwidth: float  # memory bandwidth, bytes/s
    clock: float  # cycles/s
    attention: float  # share of the peak in the schedule of the attention kernel (docs/performance_notes.md)
    products: float  # the same of the kernels for a block's products, which are not used on v4 and v5p
    link: float  # bytes/s of a link between chips, in one direction
    wraps: int  # length of grid axes that form a ring; 0: all axes do if all are multiples of 4
    smallest: str  # smallest topology
    devices: int = 1  # JAX devices of a chip
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def ici(self, grid: tuple[int, ...]) -> float:
        """Return the bytes/s that each chip can send; a chip in a corner has the fewest links."""
        cubes = not self.wraps and not any(n % 4 for n in grid)
        return self.link * sum(2 if cubes or n == self.wraps else 1 for n in grid if n > 1)


_MEGACORE = {"chip_config_name": "megacore"}  # two cores as one device
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 1.05e9, 0.4, 0.92, 45e9, 0, "v4:2x2x1", options=_MEGACORE),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 1.5e9, 0.38, 0.93, 50e9, 16, "v5e:2x2"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 1.75e9, 0.4, 0.92, 100e9, 0, "v5p:2x2x1", options=_MEGACORE),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 1.75e9, 0.11, 0.78, 100e9, 16, "v6e:2x2"),
    # A chip is two devices, each with half of the memory.
    "tpu7x": Chip(96 * GIB, 2307e12 / 2, 7380e9 / 2, 2.2e9, 0.11, 0.85, 100e9, 0, "tpu7x:2x2x1", devices=2),
}


def grid_of(topology: str) -> tuple[str, tuple[int, ...]]:
    """Return chip and grid of a topology such as "v5e:4x8"; `UserError` if they are malformed or unknown."""
    chip, _, grid = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UserError(f"--topology is {topology!r}; write CHIP:GRID, such as v5e:4x8 for 32 chips of v5e.")
    check_choice("--topology's chip", chip, CHIPS)
    return chip, tuple(map(int, grid.split("x")))


def devices_of(topology: str) -> tuple[list[Any], Chip]:
    """Return abstract devices of a topology such as "v5e:4x8", and their kind; `UserError` also without libtpu."""
    chip, _ = grid_of(topology)
    # Otherwise libtpu asks a metadata server, and serves only one process of a machine.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # otherwise libtpu complains on stderr
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import_extra("libtpu", "tpu", "planning for TPUs")
    with unreadable_as(f"--topology={topology!r} is not a topology of {chip}"):
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **CHIPS[chip].options)
    return found.devices, CHIPS[chip]


FREE = (  # without a cost
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "partition-id", "after-all",
    "custom-call",
)  # fmt: skip
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Milliseconds of a step."""

    ms: float  # all operations, one after the other
    exposed_ms: float  # collectives while nothing else runs
    hidden_ms: float  # collectives while other operations run
    step_ms: float  # operations and exposed collectives


def roofline(text: str, topology: str, devices: int) -> Roofline:
    """Estimate the time of a program, `compiled.as_text()`, on `devices` devices of a topology such as "v5e:4x8"."""
    name, grid = grid_of(topology)
    chip = CHIPS[name]
    program = hlo.parse(text)
    clock = exposed = busy = ms = 0.0
    executions = list(program.executions(cycles))
    sent = [hlo.inside(program, execution, devices) for execution in executions]
    last = {chain: i for i, pieces in enumerate(sent) for chain, _ in pieces if chain}
    ends: dict[str, float] = {}  # end times of started collectives, by chain or name of their start
    free = 0.0  # end of the traffic
    for i, (execution, pieces) in enumerate(zip(executions, sent, strict=True)):
        instruction = execution.instruction
        waits = [instruction.operands[0]] if instruction.opcode.endswith("-done") and instruction.operands else []
        for chain, each in pieces:
            key = chain or instruction.name
            if key not in ends:
                # A smaller group is along one axis, or on a part of the grid with unknown links.
                whole = each.group >= chip.devices * math.prod(grid) and each.kind != "collective-permute"
                time = each.sent / (chip.ici(grid) if whole else chip.link)
                free = max(clock, free) + time
                ends[key] = free
                busy += time
            if last[chain] == i if chain else not instruction.opcode.endswith("-start"):
                waits.append(key)
        for key in waits:
            delay = max(0.0, ends.pop(key, 0.0) - clock)
            clock += delay
            exposed += delay
        taken = seconds(program, execution, bool(pieces), chip)
        clock += taken
        ms += 1e3 * taken
    return Roofline(ms, 1e3 * exposed, max(0.0, 1e3 * (busy - exposed)), ms + 1e3 * exposed)


def cycles(executions: Iterable[Execution]) -> float:
    """Return the compiler's estimate of the cycles of `executions`."""
    return sum(each.instruction.cycles * each.count for each in executions)


def seconds(program: Program, execution: Execution, communicates: bool, chip: Chip) -> float:
    """Return the seconds of all executions of an instruction, which `communicates` if part of a collective.

    Kernels have no estimate by the compiler and take the time of their FLOPs. Copies and gathers without an estimate
    move their result twice, or once between memories.
    """
    instruction = execution.instruction
    count = execution.count
    if instruction.opcode.endswith("-start"):
        return 0.0  # while other operations run
    work = sum(kernel_work(x.instruction, chip) for x in (execution, *program.inside(execution)))
    if work:
        return count * work / chip.peak
    if instruction.cycles:
        return count * instruction.cycles / chip.clock
    if communicates or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    moved = sum(x.bytes if "S(" in x.layout else 2 * x.bytes for x in instruction.arrays)
    return count * moved / chip.bandwidth


def kernel_work(instruction: hlo.Instruction, chip: Chip) -> float:
    """Return the declared FLOPs of a Pallas kernel over the share of the peak that it reaches; 0 for others."""
    if _KERNEL not in instruction.attributes:
        return 0.0
    config = json.loads(instruction.attributes.partition("backend_config=")[2])
    flops = float(config["custom_call_config"].get("cost_estimate", {}).get("flops", 0))
    return flops / (chip.attention if instruction.name.startswith("attention") else chip.products)
