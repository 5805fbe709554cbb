"""Time of a compiled program on a TPU by its compiler's estimates, part by part: a model, not a measurement.

"ms" is the compiler's estimate of cycles over the chip's clock; kernels, which it does not estimate, take the length of
their schedules. "hbm_ms" is a lower bound: bytes that operations read from and write to the chip's memory, in padded
layouts, over its bandwidth.

A collective takes the bytes that a chip sends, by the best algorithm on a ring, over the bandwidth of its links, or of
the network between slices. The time of operations between its start and its end is hidden, and the rest is exposed.
"""

import collections
import dataclasses
import math
import re
from typing import Any

from xclip_jax.parallel import hlo
from xclip_jax.parallel.hlo import BETWEEN_SLICES, KINDS, Collective, inside
from xclip_jax.parallel.schedule import Kernel, Schedule, kernel_of, schedules
from xclip_jax.parallel.topology import CHIPS, Chip, grid_of

# The first pattern that matches an operation's name and source decides its part, in a tower and elsewhere.
_TOWER_PARTS = (
    ("MLP", r"/mlp/"),
    ("q, k, v and output products", r"/attention/(qkv|out)/"),
    ("attention", r"/attention"),
    ("LayerNorm", r"norm"),
    ("stacks of a loop", r"dynamic.(update.)?slice"),
    ("patches, tokens, residuals", ""),
)
_OTHER_PARTS = (
    ("heads", r"TwoTowers\.project"),
    ("losses", r"jvp\("),
    ("optimizer", r"/cond/branch|/(square|reduce_sum|sqrt)$"),
    ("other", ""),
)
COLUMNS = ("image", "text", "neither")
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "reshape",
    "partition-id",
    "after-all",
    "send",
)
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")  # in a fusion: nothing is written for them
_Kernels = dict[str, tuple[Kernel, Schedule | None]]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The account of a program; times in milliseconds.

    Attributes:
      parts: {"part", "image", "text", "neither", "ms", "hbm_ms"} of each, the longest first.
      ms, hbm_ms: sums over the parts.
      exposed_ms, hidden_ms: time of collectives while nothing else runs, and while other operations run.
      step_ms: all operations, one after the other, and the exposed collectives.
      kernels: {"name", "count", "ms", "by"} of each; "by" is "schedule", or "FLOPs and bytes" without a schedule.
    """

    parts: list[dict[str, Any]]
    ms: float
    hbm_ms: float
    exposed_ms: float
    hidden_ms: float
    step_ms: float
    kernels: list[dict[str, Any]]


def roofline(text: str, topology: str, devices: int) -> Roofline:
    """Return the account of a program, `compiled.as_text()`, for `devices` devices of a topology such as "v5e:4x8"."""
    (name, grid), program = grid_of(topology), hlo.parse(text)
    chip, executions = CHIPS[name], list(program.executions(_cycles))
    kernels = _kernels(program, executions, name)
    sent = [inside(program, execution, devices) for execution in executions]
    costs = [_cost(program, x, kernels, bool(pieces), chip) for x, pieces in zip(executions, sent, strict=True)]
    rows: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys((*COLUMNS, "ms", "hbm_ms"), 0.0))
    for execution, (seconds, size) in zip(executions, costs, strict=True):
        part, column = part_of(_named(program, execution))
        for key, value in ((column, seconds), ("ms", seconds), ("hbm_ms", size / chip.bandwidth)):
            rows[part][key] += 1e3 * value
    exposed, busy = _collectives(executions, sent, [seconds for seconds, _ in costs], chip, grid)
    times = {x.instruction.name: (x.count, seconds) for x, (seconds, _) in zip(executions, costs, strict=True)}
    ms = sum(row["ms"] for row in rows.values())
    return Roofline(
        parts=sorted(({"part": part} | row for part, row in rows.items() if any(row.values())), key=lambda x: -x["ms"]),
        ms=ms,
        hbm_ms=sum(row["hbm_ms"] for row in rows.values()),
        exposed_ms=1e3 * exposed,
        hidden_ms=max(0.0, 1e3 * (busy - exposed)),
        step_ms=ms + 1e3 * exposed,
        kernels=_kernel_rows(kernels, times),
    )


def part_of(instruction: hlo.Instruction) -> tuple[str, str]:
    """Return the part of a train step that an instruction belongs to, and one of `COLUMNS`."""
    tower = re.search(r"encode_(image|text)", instruction.source)
    column = tower[1] if tower else "neither"
    if instruction.opcode.startswith("copy") or instruction.opcode.endswith("-start"):
        return "copies", column
    text, parts = f"{instruction.name} {instruction.source}", _TOWER_PARTS if tower else _OTHER_PARTS
    return next(part for part, pattern in parts if re.search(pattern, text)), column


def _named(program: hlo.Program, execution: hlo.Execution) -> hlo.Instruction:
    """Return the instruction, or the last one inside with a source if it has none, like fusions with collectives."""
    inner = () if execution.instruction.source else program.inside(execution)
    named = [x.instruction for x in inner if x.instruction.source and x.instruction.opcode not in KINDS]
    return named[-1] if named else execution.instruction


def _cycles(executions: list[hlo.Execution]) -> float:
    return sum(each.instruction.cycles * each.count for each in executions)


def _kernels(program: hlo.Program, executions: list[hlo.Execution], chip: str) -> _Kernels:
    """Kernels of a program with their schedules, by the names of the instructions that call them."""
    kernels = {}
    for execution in executions:
        for each in (execution, *program.inside(execution)):  # a fusion may run a kernel and a piece of a collective
            if kernel := kernel_of(each.instruction, program.computations[each.computation]):
                kernels[execution.instruction.name] = kernel
    known = schedules(chip, kernels.values())
    return {name: (kernel, known[kernel]) for name, kernel in kernels.items()}


def _kernel_rows(kernels: _Kernels, times: dict[str, tuple[int, float]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, (kernel, schedule) in kernels.items():
        count, seconds = times[name]
        by = "schedule" if schedule else "FLOPs and bytes"
        row = rows.setdefault((kernel.name, by), {"name": kernel.name, "count": 0, "ms": 0.0, "by": by})
        row["count"] += count
        row["ms"] += 1e3 * seconds
    return list(rows.values())


def _cost(
    program: hlo.Program, execution: hlo.Execution, kernels: _Kernels, communicates: bool, chip: Chip
) -> tuple[float, float]:
    """Return seconds of all executions of an instruction, and the bytes of memory that they read and write."""
    instruction, count = execution.instruction, execution.count
    opcode, cycles = instruction.opcode, float(instruction.cycles)
    kernel, schedule = kernels.get(instruction.name, (None, None))
    view = opcode in _FREE or (opcode == "custom-call" and kernel is None) or opcode.endswith("-done")
    if not cycles and kernel is None and (view or communicates):  # or nothing but a collective
        return 0.0, 0.0
    size = traffic(program, execution)
    if opcode.endswith("-start"):
        return 0.0, count * size  # while other operations run
    if kernel is not None:
        cycles = schedule.cycles if schedule else chip.clock * kernel.flops / chip.peak
    seconds = cycles / chip.clock
    # Without an estimate, as for gathers, or for kernels by their FLOPs: no shorter than the memory traffic.
    if not (instruction.cycles or schedule):
        seconds = max(seconds, size / chip.bandwidth)
    return count * seconds, count * size


def _collectives(
    executions: list[hlo.Execution],
    sent: list[list[tuple[str, Collective]]],
    seconds: list[float],
    chip: Chip,
    grid: tuple[int, ...],
) -> tuple[float, float]:
    """Return the seconds in which the program waits for collectives, and in which collectives travel.

    Links between chips and the network between slices each carry one collective at a time.
    """
    last = {chain: i for i, pieces in enumerate(sent) for chain, _ in pieces if chain}
    ends: dict[str, float] = {}  # end times of started collectives, by chain or name of their start
    clock = exposed = busy = 0.0
    free = {True: 0.0, False: 0.0}  # when the network between slices and the links between chips are free
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
        clock += seconds[i]
    return exposed, busy


def _bandwidth(collective: Collective, chip: Chip, grid: tuple[int, ...]) -> float:
    """Bytes/s at which a device sends a collective."""
    if collective.kind.endswith(BETWEEN_SLICES):
        return chip.network
    # A group of some chips is along one axis, or on a part of the grid with unknown links.
    whole = collective.group >= chip.devices * math.prod(grid)
    return chip.ici(grid) if whole and collective.kind != "collective-permute" else chip.link


# --- bytes of the chip's memory (HBM)


def traffic(program: hlo.Program, execution: hlo.Execution) -> float:
    """Return the bytes of one execution, in padded layouts, without vector memory and without collectives."""
    instruction, computation = execution.instruction, program.computations[execution.computation]
    if instruction.opcode.endswith("-start"):
        ends = instruction.arrays[:2]  # of a copy or a slice between memories, in either order
        return sum(x.in_hbm for x in ends) * min((x.padded_bytes for x in ends), default=0.0)
    total = _written(program, instruction, computation)
    for position, name in enumerate(instruction.operands):
        arrays = computation[name].arrays if name in computation else []
        if len(arrays) == 1 and arrays[0].in_hbm:
            total += _read(program, instruction, position, arrays[0].padded_bytes)
    return total


def _read(program: hlo.Program, user: hlo.Instruction, position: int, whole: float) -> float:
    """Bytes of its operand at `position`, of `whole` bytes, that an instruction reads."""
    if user.opcode in _SLICES and position == 0:
        return min(whole, sum(x.padded_bytes for x in user.arrays))
    if user.opcode == "tuple" or user.opcode in KINDS or (_updates(user) and position == 0):
        return 0.0  # passed on, sent, or changed in place
    if user.opcode != "fusion":
        return whole
    body = program.computations[user.called("calls")[0]]
    name = next(x.name for x in body.values() if _parameter(x) and x.literal == str(position))
    return _read_by_all(program, body, name, whole)


def _read_by_all(program: hlo.Program, body: hlo.Computation, name: str, whole: float) -> float:
    """Bytes of a value that the instructions of a fusion read."""
    total = 0.0
    for user in body.values():
        if name in user.operands:
            if user.opcode in _VIEWS and not user.root:
                total += _read_by_all(program, body, user.name, whole)
            else:
                total += sum(_read(program, user, i, whole) for i, x in enumerate(user.operands) if x == name)
    return min(whole, total)


def _written(program: hlo.Program, instruction: hlo.Instruction, computation: hlo.Computation) -> float:
    """Bytes of an instruction's result that it writes."""
    body, parts = computation, [instruction]
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called("calls")[0]]
        result = hlo.root(body)
        parts = [body[name] for name in result.operands] if result.opcode == "tuple" else [result]
    total = 0.0
    for i, array in enumerate(instruction.arrays):
        part = parts[i] if len(parts) == len(instruction.arrays) else instruction
        if not array.in_hbm or _parameter(part) or part.opcode in KINDS:
            continue
        while part.opcode in _VIEWS and part.operands[0] in body and part is not instruction:
            part = body[part.operands[0]]
        whole = array.padded_bytes
        total += min(whole, sum(x.padded_bytes for x in body[part.operands[1]].arrays)) if _updates(part) else whole
    return total


def _updates(instruction: hlo.Instruction) -> bool:
    return instruction.opcode == "dynamic-update-slice"


def _parameter(instruction: hlo.Instruction) -> bool:
    return instruction.opcode == "parameter"
