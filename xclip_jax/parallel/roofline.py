"""Time of a compiled step on a TPU by its compiler's estimates: a model, not a measurement.

An operation takes the compiler's estimate of cycles over the chip's clock. A collective takes the bytes that a chip
sends, by the best algorithm on a ring, over the bandwidth of its links, or of the network between slices. The time of
operations between its start and its end is hidden, and the rest is exposed.
"""

import dataclasses
import json
import math
from collections.abc import Iterable

from xclip_jax.parallel import hlo
from xclip_jax.parallel.hlo import BETWEEN_SLICES, Collective, Execution, Program
from xclip_jax.parallel.topology import CHIPS, Chip, grid_of

# Operations that take no time.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "reshape",
    "partition-id",
    "after-all",
    "send",
    "custom-call",
)
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Milliseconds of a step."""

    ms: float  # all operations, one after the other
    exposed_ms: float  # collectives while nothing else runs
    hidden_ms: float  # collectives while other operations run
    step_ms: float  # operations and exposed collectives


def roofline(text: str, topology: str, devices: int) -> Roofline:
    """Return the time of a program, `compiled.as_text()`, for `devices` devices of a topology such as "v5e:4x8"."""
    (name, grid), program = grid_of(topology), hlo.parse(text)
    chip, clock, exposed, busy = CHIPS[name], 0.0, 0.0, 0.0
    executions = list(program.executions(cycles))
    sent = [hlo.inside(program, execution, devices) for execution in executions]
    last = {chain: i for i, pieces in enumerate(sent) for chain, _ in pieces if chain}
    ends: dict[str, float] = {}  # end times of started collectives, by chain or name of their start
    free = {True: 0.0, False: 0.0}  # when the network between slices and the links between chips are free
    ms = 0.0
    for i, (execution, pieces) in enumerate(zip(executions, sent, strict=True)):
        instruction = execution.instruction
        waits = [instruction.operands[0]] if instruction.opcode.endswith("-done") and instruction.operands else []
        for chain, each in pieces:
            key = chain or instruction.name
            if key not in ends:
                time = each.sent / _bandwidth(each, chip, grid)
                network = each.kind.endswith(BETWEEN_SLICES)
                ends[key] = free[network] = max(clock, free[network]) + time
                busy += time
            if last[chain] == i if chain else not instruction.opcode.endswith(("-start", "recv")):
                waits.append(key)
        for key in waits:
            delay = max(0.0, ends.pop(key, 0.0) - clock)
            clock, exposed = clock + delay, exposed + delay
        taken = seconds(program, execution, bool(pieces), chip)
        clock, ms = clock + taken, ms + 1e3 * taken
    return Roofline(ms, 1e3 * exposed, max(0.0, 1e3 * (busy - exposed)), ms + 1e3 * exposed)


def cycles(executions: Iterable[Execution]) -> float:
    """Return the compiler's estimate of the cycles of `executions`."""
    return sum(each.instruction.cycles * each.count for each in executions)


def seconds(program: Program, execution: Execution, communicates: bool, chip: Chip) -> float:
    """Return the seconds of all executions of an instruction, which `communicates` if it has a part of a collective.

    The compiler estimates no kernels, whose FLOPs count, and few copies and gathers, which move their result twice, but
    once between memories.
    """
    instruction, count = execution.instruction, execution.count
    if instruction.opcode.endswith("-start"):
        return 0.0  # while other operations run
    if flops := sum(kernel_flops(each.instruction) for each in (execution, *program.inside(execution))):
        return count * flops / (chip.kernels * chip.peak)
    if instruction.cycles:
        return count * instruction.cycles / chip.clock
    if communicates or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    moved = sum(x.bytes if "S(" in x.layout else 2 * x.bytes for x in instruction.arrays)
    return count * moved / chip.bandwidth


def kernel_flops(instruction: hlo.Instruction) -> float:
    """Return the FLOPs of a Pallas kernel by its author's estimate, 0 for other instructions."""
    if _KERNEL not in instruction.attributes:
        return 0.0
    config = json.loads(instruction.attributes.partition("backend_config=")[2])
    return float(config["custom_call_config"].get("cost_estimate", {}).get("flops", 0))


def _bandwidth(collective: Collective, chip: Chip, grid: tuple[int, ...]) -> float:
    """Bytes/s at which a device sends a collective."""
    if collective.kind.endswith(BETWEEN_SLICES):
        return chip.network
    # A group of some chips is along one axis, or on a part of the grid with unknown links.
    whole = collective.group >= chip.devices * math.prod(grid)
    return chip.ici(grid) if whole and collective.kind != "collective-permute" else chip.link
