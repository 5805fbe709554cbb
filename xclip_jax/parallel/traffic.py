"""Bytes that the operations of a compiled TPU program read from and write to the chip's memory (HBM)."""

from xclip_jax.parallel import hlo
from xclip_jax.parallel.collectives import KINDS

_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")  # in a fusion: nothing is written for them


def traffic(program: hlo.Program, execution: hlo.Execution) -> float:
    """Bytes of one execution, in padded layouts, without what is in vector memory; collectives count nothing."""
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
