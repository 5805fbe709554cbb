"""Time and memory traffic of a step on a TPU, by part of the step, without a TPU.

    xclip-jax plan --config pretrain:objective=clip --topology v5e:4x8 --hlo step.hlo
    JAX_PLATFORMS=cpu python -m benchmarks.roofline step.hlo v5e:4x8

Times come from `xclip_jax.train.cost.roofline`. "HBM" is a lower bound: the bytes that operations read from and write
to the chip's memory, in padded layouts, over bandwidth.
"""

import argparse
import collections
import math
import pathlib
import re
from typing import Any

from xclip_jax.core.errors import exit_with_message
from xclip_jax.train.cost import hlo
from xclip_jax.train.cost.hlo import KINDS, Array, Computation, Execution, Instruction, Program
from xclip_jax.train.cost.roofline import CHIPS, FREE, cycles, grid_of, roofline, seconds

# The first pattern in an operation's name and source decides its part, in a tower and elsewhere.
_TOWER_PARTS = (
    ("block kernels", r"/(project|finish)(_gradient)?/pallas_call"),
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
_UPDATE = "dynamic-update-slice"
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")  # a fusion writes nothing for them


def parts(text: str, topology: str, devices: int) -> list[dict[str, Any]]:
    """Return {"part", "image", "text", "neither", "ms", "hbm_ms"} of each part of a compiled step, longest first."""
    chip = CHIPS[grid_of(topology)[0]]
    program = hlo.parse(text)
    rows: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys((*COLUMNS, "ms", "hbm_ms"), 0.0))
    for execution in program.executions(cycles):
        opcode = execution.instruction.opcode
        communicates = bool(hlo.inside(program, execution, devices))
        taken = seconds(program, execution, communicates, chip)
        moves = taken or not (communicates or opcode in FREE or opcode.endswith("-done"))
        size = traffic(program, execution) if moves else 0.0
        part, column = part_of(_named(program, execution))
        for key, value in ((column, taken), ("ms", taken), ("hbm_ms", execution.count * size / chip.bandwidth)):
            rows[part][key] += 1e3 * value
    return sorted(({"part": part} | row for part, row in rows.items() if any(row.values())), key=lambda x: -x["ms"])


def part_of(instruction: Instruction) -> tuple[str, str]:
    """Return an instruction's part of a train step and its column, one of `COLUMNS`."""
    tower = re.search(r"encode_(image|text)", source(instruction))
    column = tower[1] if tower else "neither"
    if instruction.opcode.startswith("copy") or instruction.opcode.endswith("-start"):
        return "copies", column
    text = f"{instruction.name} {source(instruction)}"
    patterns = _TOWER_PARTS if tower else _OTHER_PARTS
    return next(part for part, pattern in patterns if re.search(pattern, text)), column


def _named(program: Program, execution: Execution) -> Instruction:
    """Return the instruction, or if it has no source, like a fusion with a collective, the last inside with one."""
    inner = () if source(execution.instruction) else program.inside(execution)
    named = [x.instruction for x in inner if source(x.instruction) and x.instruction.opcode not in KINDS]
    return named[-1] if named else execution.instruction


def padded_bytes(array: Array) -> float:
    """Bytes of an array, with the padding of its layout to whole tiles."""
    order, _, tiling = array.layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if not (tile and array.shape):
        return array.bytes
    sizes = [array.shape[int(axis)] for axis in order.split(",")]  # minor first
    for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")])):
        if i < len(sizes):
            sizes[i] = math.ceil(sizes[i] / n) * n
    return math.prod(sizes) * array.bits / 8


def in_hbm(array: Array) -> bool:
    """Whether an array is in a chip's main memory, memory space 0."""
    return "S(" not in array.layout


def traffic(program: Program, execution: Execution) -> float:
    """Return the HBM bytes of one execution, in padded layouts, without collectives."""
    instruction = execution.instruction
    computation = program.computations[execution.computation]
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
    """Bytes that an instruction reads of its operand at `position`, which has `whole` bytes."""
    if user.opcode in _SLICES and position == 0:
        return min(whole, sum(padded_bytes(x) for x in user.arrays))
    if user.opcode == "tuple" or user.opcode in KINDS or (user.opcode == _UPDATE and position == 0):
        return 0.0  # passed on, sent, or changed in place
    if user.opcode != "fusion":
        return whole
    body = program.computations[user.called("calls")[0]]
    name = next(x.name for x in body.values() if x.opcode == "parameter" and x.literal == str(position))
    return _read_by_all(program, body, name, whole)


def _read_by_all(program: Program, body: Computation, name: str, whole: float) -> float:
    """Bytes that the instructions of a fusion read of a value."""
    total = 0.0
    for user in body.values():
        if name in user.operands:
            if user.opcode in _VIEWS and not user.root:
                total += _read_by_all(program, body, user.name, whole)
            else:
                total += sum(_read(program, user, i, whole) for i, x in enumerate(user.operands) if x == name)
    return min(whole, total)


def _written(program: Program, instruction: Instruction, computation: Computation) -> float:
    """Bytes that an instruction writes."""
    body = computation
    parts = [instruction]
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called("calls")[0]]
        result = hlo.root(body)
        parts = [body[name] for name in result.operands] if result.opcode == "tuple" else [result]
    total = 0.0
    for i, array in enumerate(instruction.arrays):
        part = parts[i] if len(parts) == len(instruction.arrays) else instruction
        if not in_hbm(array) or part.opcode == "parameter" or part.opcode in KINDS:
            continue
        while part.opcode in _VIEWS and part.operands[0] in body and part is not instruction:
            part = body[part.operands[0]]
        whole = padded_bytes(array)
        if part.opcode == _UPDATE:
            whole = min(whole, sum(padded_bytes(x) for x in body[part.operands[1]].arrays))
        total += whole
    return total


def source(instruction: Instruction) -> str:
    """The path of JAX names that an instruction comes from, "" if the compiler kept none."""
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path, help="file from plan --hlo")
    parser.add_argument("topology")
    options = parser.parse_args()
    with exit_with_message():
        chip, grid = grid_of(options.topology)
        text = options.program.read_text()
        devices = math.prod(grid) * CHIPS[chip].devices
        exposed = roofline(text, options.topology, devices).exposed_ms
        rows = parts(text, options.topology, devices)
    print(f"{'ms of a step':<30}" + "".join(f"{name:>9}" for name in (*COLUMNS, "all", "HBM")))
    for row in rows:
        if max(row["ms"], row["hbm_ms"]) >= 0.05:
            print(f"{row['part']:<30}" + "".join(f"{row[key]:>9.1f}" for key in (*COLUMNS, "ms", "hbm_ms")))
    ms, hbm_ms = (sum(row[key] for row in rows) for key in ("ms", "hbm_ms"))
    print(f"{'collectives, exposed':<57}{exposed:>9.1f}")
    print(f"{'sum':<57}{ms + exposed:>9.1f}{hbm_ms:>9.1f}")


if __name__ == "__main__":
    main()
