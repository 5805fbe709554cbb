"""Parse the text of a compiled program: computations, executions of each instruction, and collectives."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*?[)}\]]) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_CONFIG_LINE = re.compile(r"\n(?=\"|\}, )")  # line break inside the configuration of a kernel
_INDEX = re.compile(r"/\*index=\d+\*/")  # element numbers of long tuples


class Array(NamedTuple):
    """An array of a program: type, shape and layout, such as "1,0:T(8,128)S(1)"."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bits(self) -> int:
        """Bits per number, from the name of its type such as "bf16"; 8 for "pred"."""
        match = re.search(r"\d+", self.dtype)
        return int(match[0]) if match else 8

    @property
    def bytes(self) -> float:
        """Bytes of the numbers, without padding."""
        return math.prod(self.shape) * self.bits / 8


def arrays(text: str) -> list[Array]:
    """Parse the arrays of a type, which may be a tuple."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation; names are without "%"."""

    name: str
    opcode: str
    type: str  # type of the result, with layouts
    operands: tuple[str, ...]
    literal: str  # the value of a constant, or the number of a parameter
    attributes: str  # the text after the operands
    root: bool  # whether its result is the computation's

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.type)

    @property
    def cycles(self) -> int:
        """Cycles of one execution, estimated by the TPU compiler; 0 without an estimate."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    def called(self, *attributes: str) -> list[str]:
        """Return the names of the computations in `attributes`, in their order."""
        matches = (re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes) for name in attributes)
        names = (name for match in matches if match for name in (match[1] or match[2]).split(","))
        return [name.strip().lstrip("%") for name in names]


Computation = dict[str, Instruction]


class Execution(NamedTuple):
    """An executed instruction, its total number of executions, and the name of its computation."""

    instruction: Instruction
    count: int
    computation: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, with their instructions in scheduled order, and the entry computation's name."""

    computations: dict[str, Computation]
    entry: str

    def executions(
        self, weigh: Callable[[list[Execution]], float], computation: str = "", count: int = 1
    ) -> Iterator[Execution]:
        """Yield executions in order, with trip counts of loops, and only the heaviest branch of a conditional.

        A fusion is one instruction, see `inside`.
        """
        computation = computation or self.entry
        for each in self.computations[computation].values():
            if each.opcode == "while":
                (body,) = each.called("body")
                yield from self.executions(weigh, body, count * self._turns(each))
            elif each.opcode == "call":
                yield from self.executions(weigh, each.called("to_apply")[0], count)
            elif each.opcode == "conditional":
                names = each.called("branch_computations") or each.called("true_computation", "false_computation")
                branches = [list(self.executions(weigh, name, count)) for name in names]
                yield from max(branches, key=weigh)
            else:
                yield Execution(each, count, computation)

    def inside(self, execution: Execution) -> Iterator[Execution]:
        """Yield all instructions in the computations of a fusion or an asynchronous call, at any depth."""
        if execution.instruction.opcode.endswith(("-update", "-done")):
            return  # its start has the same call
        for name in execution.instruction.called("calls", "called_computations"):
            for each in self.computations[name].values():
                inner = Execution(each, execution.count, name)
                yield inner
                yield from self.inside(inner)

    def _turns(self, loop: Instruction) -> int:
        """Return a loop's trip count by the compiler's note, or the limit of its counter from 0; else 1."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        limits = [_constant(condition, name) for name in root(condition).operands]
        return next(filter(None, limits), 1)


def root(computation: Computation) -> Instruction:
    """Return the instruction with the computation's result."""
    return next(each for each in computation.values() if each.root)


def _constant(computation: Computation, name: str) -> int | None:
    each = computation.get(name)
    if each is not None and each.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, each.operands[0])
    return int(each.literal) if each and each.opcode == "constant" and each.literal.isdigit() else None


def parse(text: str) -> Program:
    """Parse the text of a compiled program."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in map(str.strip, _INDEX.sub("", _CONFIG_LINE.sub(" ", text)).splitlines()):
        match = _INSTRUCTION.match(line)
        head = None if match else _HEAD.match(line)
        if match:
            is_root, instruction, shape, opcode = match.groups()
            rest = line[match.end() :]
            depths = itertools.accumulate(({"(": 1, ")": -1}.get(c, 0) for c in rest), initial=1)
            end = next((i for i, depth in enumerate(depths) if not depth), len(rest) + 1)
            inner = rest[: end - 1]
            operands = tuple(re.findall(r"%([\w.\-]+)", inner))
            literal = inner if opcode in ("constant", "parameter") else ""
            attributes = rest[end:].lstrip(", ")
            made = Instruction(instruction, opcode, shape, operands, literal, attributes, bool(is_root))
            computations[name][instruction] = made
        elif head:
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
    return Program(computations, entry)


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of `KINDS`
    shapes: tuple[str, ...]  # gathered, reduced or sent arrays, such as "f32[16,8]"
    bytes: float  # payload of one execution: these arrays, counted once per group
    group: int  # number of devices in a group
    count: int  # executions in a run of the program, loops included

    @property
    def total(self) -> float:
        """Payload of all executions, bytes."""
        return self.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes sent by a device in all executions, with the best algorithm on a ring."""
        rounds = {"all-reduce": 2 * (self.group - 1), "collective-permute": self.group}
        return self.total * rounds.get(self.kind, self.group - 1) / self.group


def collectives(text: str, devices: int) -> list[Collective]:
    """Return all collectives of a compiled program, `compiled.as_text()` for `devices` devices, with trip counts.

    A conditional counts as the branch with the largest payload.
    """
    program = parse(text)
    executions = program.executions(lambda branch: sum(each.total for each in _distinct(program, branch, devices)))
    return _distinct(program, list(executions), devices)


def summary(sent: list[Collective]) -> dict[str, float]:
    """Payload in bytes by kind."""
    totals: dict[str, float] = collections.defaultdict(float)
    for each in sent:
        totals[each.kind] += each.total
    return dict(totals)


def inside(program: Program, execution: Execution, devices: int) -> list[tuple[str, Collective]]:
    """Return the collectives of an execution and inside it, each with the id of its chain, or "".

    The TPU compiler spreads a collective over the fusions that hide it. Each has the whole collective in its text, and
    the same chain; in a loop it may continue one execution.
    """
    result = []
    for each in (execution, *program.inside(execution)):
        collective = _collective(each, devices)
        if collective:
            chain = re.search(r'chain_id="(\d+)"', each.instruction.attributes)
            result.append((chain[1] if chain else "", collective))
    return result


def _distinct(program: Program, executions: list[Execution], devices: int) -> list[Collective]:
    """Return the collectives of `executions`; the pieces of a chain are one."""
    chains: dict[object, Collective] = {}
    for execution in executions:
        for chain, collective in inside(program, execution, devices):
            key = chain or len(chains)
            if key not in chains or collective.total < chains[key].total:
                chains[key] = collective
    return list(chains.values())


def _collective(execution: Execution, devices: int) -> Collective | None:
    instruction, count, computation = execution
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction.attributes, devices)
    if kind not in KINDS or group == 1:
        return None
    arrays = instruction.arrays
    if instruction.opcode != kind and kind != "all-reduce":
        # An asynchronous start returns operands and results, and on TPUs some flags.
        arrays = [x for x in arrays if x.shape]
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    size = (group if kind == "reduce-scatter" else 1) * sum(x.bytes for x in arrays)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU compiler writes it as a sum and a slice in one fusion
    return Collective(kind, tuple(map(str, arrays)), size, group, count)


def _group(attributes: str, devices: int) -> int:
    groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if groups:
        return int(groups[2])
    # Axes of a mesh, or parts of axes such as 'data':(1)4.
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2]))
    members = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if members:
        return members[1].count(",") + 1
    return 1 if "source_target_pairs={}" in attributes else devices
