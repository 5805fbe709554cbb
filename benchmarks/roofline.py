"""Where the time of a step on a TPU goes, part by part, and how long its memory traffic takes; no TPU is used.

    xclip-jax plan --config pretrain:objective=clip --topology v5e:4x8 --hlo step.hlo
    python -m benchmarks.roofline step.hlo v5e:4x8

Times come from `xclip_jax.parallel.topology`, but for Pallas kernels, which take the length of their schedules here.
"HBM" is a lower bound: bytes that operations read from and write to the chip's memory, in padded layouts, over its
bandwidth.
"""

import argparse
import collections
import math
import pathlib
import re
from typing import Any

from benchmarks.schedule import kernel_of, schedules, source
from xclip_jax.core.errors import exit_with_message
from xclip_jax.parallel import hlo
from xclip_jax.parallel.hlo import KINDS, Array, Computation, Execution, Instruction, Program
from xclip_jax.parallel.topology import CHIPS, FREE, cycles, grid_of, roofline, seconds

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
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")  # in a fusion: nothing is written for them


def parts(text: str, topology: str, devices: int) -> list[dict[str, Any]]:
    """{"part", "image", "text", "neither", "ms", "hbm_ms"} of each part of a compiled step, the longest first."""
    chip_name, program = grid_of(topology)[0], hlo.parse(text)
    chip, executions = CHIPS[chip_name], list(program.executions(cycles))
    kernels = {}
    for execution in executions:
        for each in (execution, *program.inside(execution)):  # a fusion may run a kernel and a piece of a collective
            if kernel := kernel_of(each.instruction, program.computations[each.computation]):
                kernels[execution.instruction.name] = kernel
    known = schedules(chip_name, kernels.values())
    rows: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys((*COLUMNS, "ms", "hbm_ms"), 0.0))
    for execution in executions:
        communicates = bool(hlo.inside(program, execution, devices))
        taken = seconds(program, execution, communicates, chip)
        if schedule := known.get(kernels.get(execution.instruction.name)):
            taken = execution.count * schedule.cycles / chip.clock
        size = 0.0 if not taken and _moves_nothing(execution.instruction, communicates) else traffic(program, execution)
        part, column = part_of(_named(program, execution))
        for key, value in ((column, taken), ("ms", taken), ("hbm_ms", execution.count * size / chip.bandwidth)):
            rows[part][key] += 1e3 * value
    return sorted(({"part": part} | row for part, row in rows.items() if any(row.values())), key=lambda x: -x["ms"])


def _moves_nothing(instruction: Instruction, communicates: bool) -> bool:
    return communicates or instruction.opcode in FREE or instruction.opcode.endswith("-done")


def part_of(instruction: Instruction) -> tuple[str, str]:
    """Return the part of a train step that an instruction belongs to, and one of `COLUMNS`."""
    tower = re.search(r"encode_(image|text)", source(instruction))
    column = tower[1] if tower else "neither"
    if instruction.opcode.startswith("copy") or instruction.opcode.endswith("-start"):
        return "copies", column
    text, patterns = f"{instruction.name} {source(instruction)}", _TOWER_PARTS if tower else _OTHER_PARTS
    return next(part for part, pattern in patterns if re.search(pattern, text)), column


def _named(program: Program, execution: Execution) -> Instruction:
    """Return the instruction, or the last one inside with a source if it has none, like fusions with collectives."""
    inner = () if source(execution.instruction) else program.inside(execution)
    named = [x.instruction for x in inner if source(x.instruction) and x.instruction.opcode not in KINDS]
    return named[-1] if named else execution.instruction


def padded_bytes(array: Array) -> float:
    """Bytes of an array with the padding of its layout: the minor dimensions are whole tiles."""
    order, _, tiling = array.layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if not (tile and array.shape):
        return array.bytes
    sizes = [array.shape[int(axis)] for axis in order.split(",")]  # minor first
    for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
        if i < len(sizes):
            sizes[i] = math.ceil(sizes[i] / n) * n
    return math.prod(sizes) * hlo.BITS.get(array.dtype, 32) / 8


def in_hbm(array: Array) -> bool:
    """Whether an array is in a chip's main memory, space 0 of a layout."""
    return "S(" not in array.layout


def traffic(program: Program, execution: Execution) -> float:
    """Return the bytes of one execution, in padded layouts, without vector memory and without collectives."""
    instruction, computation = execution.instruction, program.computations[execution.computation]
    if instruction.opcode.endswith("-start"):
        ends = instruction.arrays[:2]  # a copy or a slice goes between memories, in either direction
        return sum(map(in_hbm, ends)) * min(map(padded_bytes, ends), default=0.0)
    total = _written(program, instruction, computation)
    for position, name in enumerate(instruction.operands):
        arrays = computation[name].arrays if name in computation else []
        if len(arrays) == 1 and in_hbm(arrays[0]):
            total += _read(program, instruction, position, padded_bytes(arrays[0]))
    return total


def _read(program: Program, user: Instruction, position: int, whole: float) -> float:
    """Bytes of its operand at `position`, of `whole` bytes, that an instruction reads."""
    if user.opcode in _SLICES and position == 0:
        return min(whole, sum(padded_bytes(x) for x in user.arrays))
    if user.opcode == "tuple" or user.opcode in KINDS or (_updates(user) and position == 0):
        return 0.0  # passed on, sent, or changed in place
    if user.opcode != "fusion":
        return whole
    body = program.computations[user.called("calls")[0]]
    name = next(x.name for x in body.values() if _parameter(x) and x.literal == str(position))
    return _read_by_all(program, body, name, whole)


def _read_by_all(program: Program, body: Computation, name: str, whole: float) -> float:
    """Bytes of a value that the instructions of a fusion read."""
    total = 0.0
    for user in body.values():
        if name in user.operands:
            if user.opcode in _VIEWS and not user.root:
                total += _read_by_all(program, body, user.name, whole)
            else:
                total += sum(_read(program, user, i, whole) for i, x in enumerate(user.operands) if x == name)
    return min(whole, total)


def _written(program: Program, instruction: Instruction, computation: Computation) -> float:
    """Bytes of an instruction's result that it writes."""
    body, parts = computation, [instruction]
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called("calls")[0]]
        result = hlo.root(body)
        parts = [body[name] for name in result.operands] if result.opcode == "tuple" else [result]
    total = 0.0
    for i, array in enumerate(instruction.arrays):
        part = parts[i] if len(parts) == len(instruction.arrays) else instruction
        if not in_hbm(array) or _parameter(part) or part.opcode in KINDS:
            continue
        while part.opcode in _VIEWS and part.operands[0] in body and part is not instruction:
            part = body[part.operands[0]]
        whole = padded_bytes(array)
        total += min(whole, sum(padded_bytes(x) for x in body[part.operands[1]].arrays)) if _updates(part) else whole
    return total


def _updates(instruction: Instruction) -> bool:
    return instruction.opcode == "dynamic-update-slice"


def _parameter(instruction: Instruction) -> bool:
    return instruction.opcode == "parameter"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path, help="file that plan --hlo has written")
    parser.add_argument("topology")
    parser.add_argument("--slices", type=int, default=1)
    options = parser.parse_args()
    with exit_with_message():
        chip, grid = grid_of(options.topology)
        text, devices = options.program.read_text(), math.prod(grid) * CHIPS[chip].devices * options.slices
        account, rows = roofline(text, options.topology, devices), parts(text, options.topology, devices)
    print(f"{'ms of a step':<30}" + "".join(f"{name:>9}" for name in (*COLUMNS, "all", "HBM")))
    for row in rows:
        if max(row["ms"], row["hbm_ms"]) >= 0.05:
            cells = "".join(f"{row[key]:>9.1f}" for key in (*COLUMNS, "ms", "hbm_ms"))
            print(f"{row['part']:<30}{cells}")
    sums = [sum(row[key] for row in rows) for key in ("ms", "hbm_ms")]
    print(f"{'collectives, exposed':<57}{account.exposed_ms:>9.1f}")
    print(f"{'sum':<57}{sums[0] + account.exposed_ms:>9.1f}{sums[1]:>9.1f}")


if __name__ == "__main__":
    main()
