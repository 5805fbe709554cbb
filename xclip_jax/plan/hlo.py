"""Read the text of a compiled program: its computations, how often each instruction runs, and its collectives."""

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
_CONFIG_LINE = re.compile(r"\n(?=\"|\}, )")  # the compiler may print the configuration of a kernel on several lines
_INDEX = re.compile(r"/\*index=\d+\*/")  # the compiler counts the elements of long tuples


class Array(NamedTuple):
    """An array of a program: type, shape and layout, such as "1,0:T(8,128)S(1)"."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bits(self) -> int:
        """Bits of a number: those in the name of its type, such as "bf16", and 8 for "pred"."""
        match = re.search(r"\d+", self.dtype)
        return int(match[0]) if match else 8

    @property
    def bytes(self) -> float:
        """Bytes of the numbers, without padding."""
        return math.prod(self.shape) * self.bits / 8


def arrays(text: str) -> list[Array]:
    """Arrays of a result's type, which may be a tuple."""
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
        """Arrays of the result."""
        return arrays(self.type)

    @property
    def cycles(self) -> int:
        """Cycles of one execution as the TPU compiler estimates them, 0 where it does not."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations in `attributes`, in their order."""
        matches = (re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes) for name in attributes)
        names = (name for match in matches if match for name in (match[1] or match[2]).split(","))
        return [name.strip().lstrip("%") for name in names]


Computation = dict[str, Instruction]


class Execution(NamedTuple):
    """An instruction that a program executes, `count` times in all, and the computation that it is part of."""

    instruction: Instruction
    count: int
    computation: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each with its instructions in the order of their schedule, and the first one's name."""

    computations: dict[str, Computation]
    entry: str

    def executions(
        self, weigh: Callable[[list[Execution]], float], computation: str = "", count: int = 1
    ) -> Iterator[Execution]:
        """Yield executions in order, with the trip counts of loops, and the branch with most weight of a conditional.

        A fusion is one instruction; `inside` yields what is in it.
        """
        computation = computation or self.entry
        for each in self.computations[computation].values():
            if each.opcode == "while":
                (body,) = each.called("body")
                yield from self.executions(weigh, body, count * self._turns(each, computation))
            elif each.opcode == "call":
                yield from self.executions(weigh, each.called("to_apply")[0], count)
            elif each.opcode == "conditional":
                names = each.called("branch_computations") or each.called("true_computation", "false_computation")
                branches = [list(self.executions(weigh, name, count)) for name in names]
                yield from max(branches, key=weigh)
            else:
                yield Execution(each, count, computation)

    def inside(self, execution: Execution) -> Iterator[Execution]:
        """Yield the instructions of the computations that a fusion or an asynchronous call executes, at any depth."""
        if execution.instruction.opcode.endswith(("-update", "-done")):
            return  # its start has the same call
        for name in execution.instruction.called("calls", "called_computations"):
            for each in self.computations[name].values():
                inner = Execution(each, execution.count, name)
                yield inner
                yield from self.inside(inner)

    def _turns(self, loop: Instruction, computation: str) -> int:
        """Trip count of a loop: by the compiler's note, else by its counter's start, step and limit; 1 if neither."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        body, condition = (self.computations[loop.called(name)[0]] for name in ("body", "condition"))
        test = root(condition)
        counter = next((condition[name] for name in test.operands if _index(condition.get(name)) is not None), None)
        limits = [n for n in (_constant(condition, name) for name in test.operands) if n is not None]
        index = _index(counter)
        if index is None or not limits:
            return 1
        turned = body.get(root(body).operands[index])
        steps = [_constant(body, name) for name in turned.operands] if turned else []
        outer = self.computations[computation]
        start = _constant(outer, outer[loop.operands[0]].operands[index]) if loop.operands[0] in outer else None
        return max(1, math.ceil((limits[0] - (start or 0)) / next(filter(None, steps), 1)))


def root(computation: Computation) -> Instruction:
    """Return the instruction whose result is the computation's."""
    return next(each for each in computation.values() if each.root)


def _index(instruction: Instruction | None) -> int | None:
    """The element of a tuple that an instruction takes, None for another instruction."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", instruction.attributes)
    return int(match[1]) if match else None


def _constant(computation: Computation, name: str) -> int | None:
    """The value of a whole number that is a constant or a copy of one."""
    each = computation.get(name)
    if each is not None and each.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, each.operands[0])
    return int(each.literal) if each and each.opcode == "constant" and each.literal.isdigit() else None


def parse(text: str) -> Program:
    """Read the text of a compiled program."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    text = _CONFIG_LINE.sub(" ", text)
    for raw in text.splitlines():
        line = _INDEX.sub("", raw.strip()) if "/*" in raw else raw.strip()
        instruction = _INSTRUCTION.match(line)
        head = None if instruction else _HEAD.match(line)
        if instruction:
            each = _instruction(instruction, line[instruction.end() :])
            computations[name][each.name] = each
        elif head:
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
    return Program(computations, entry)


def _instruction(match: re.Match[str], rest: str) -> Instruction:
    root, name, shape, opcode = match.groups()
    depths = itertools.accumulate(({"(": 1, ")": -1}.get(c, 0) for c in rest), initial=1)
    end = next((i for i, depth in enumerate(depths) if not depth), len(rest) + 1)
    inner = rest[: end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    literal = inner if opcode in ("constant", "parameter") else ""
    return Instruction(name, opcode, shape, operands, literal, rest[end:].lstrip(", "), bool(root))


# --- collectives

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
BETWEEN_SLICES = " between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of `KINDS`, with the suffix `BETWEEN_SLICES` between slices
    shapes: tuple[str, ...]  # arrays that one device's group holds afterwards or reduces, such as "f32[16,8]"
    bytes: float  # payload of one execution: the array that a group gathers, reduces or passes on, counted once
    group: int  # number of devices, or slices, in a group
    count: int  # executions in a run of the program, loops included

    @property
    def total(self) -> float:
        """Payload of all executions, bytes."""
        return self.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all executions, by the best algorithm on a ring."""
        rounds = {"all-reduce": 2 * (self.group - 1), "collective-permute": self.group}
        return self.total * rounds.get(self.kind.removesuffix(BETWEEN_SLICES), self.group - 1) / self.group


def collectives(text: str, devices: int) -> list[Collective]:
    """Return all collectives of a compiled program, `compiled.as_text()`, with the trip counts of loops around them.

    A conditional counts the branch with the largest payload. The program runs on `devices` devices.
    """
    program = parse(text)

    def payload(executions: list[Execution]) -> float:
        return sum(each.total for each in _distinct(program, executions, devices))

    return _distinct(program, list(program.executions(payload)), devices)


def summary(sent: list[Collective]) -> dict[str, float]:
    """Payload in bytes by kind."""
    totals: dict[str, float] = collections.defaultdict(float)
    for each in sent:
        totals[each.kind] += each.total
    return dict(totals)


def inside(program: Program, execution: Execution, devices: int) -> list[tuple[str, Collective]]:
    """Return the collectives that an instruction is or executes, each with the id of its chain, or "".

    The TPU compiler spreads a collective over the fusions that hide it: each has the whole collective in its text, and
    the same chain. Some may be in a loop that continues one execution.
    """
    result = []
    for each in (execution, *program.inside(execution)):
        collective = _collective(each, devices)
        if collective:
            chain = re.search(r'chain_id="(\d+)"', each.instruction.attributes)
            result.append((chain[1] if chain else "", collective))
    return result


def _distinct(program: Program, executions: list[Execution], devices: int) -> list[Collective]:
    """Collectives of `executions`, with the pieces of a chain as one."""
    chains: dict[object, Collective] = {}
    for execution in executions:
        for chain, collective in inside(program, execution, devices):
            key = chain or len(chains)
            if key not in chains or collective.total < chains[key].total:
                chains[key] = collective
    return list(chains.values())


def _collective(execution: Execution, devices: int) -> Collective | None:
    instruction, count, computation = execution
    if instruction.opcode == "recv":
        return _between_slices(instruction, count)
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction.attributes, devices)
    if kind not in KINDS or group == 1:
        return None
    arrays = instruction.arrays
    if instruction.opcode != kind and kind != "all-reduce":
        # The start of an asynchronous collective returns operands and results, and on TPUs some flags.
        arrays = [x for x in arrays if x.shape]
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    size = (group if kind == "reduce-scatter" else 1) * sum(x.bytes for x in arrays)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU compiler writes it as a sum and a slice in one fusion
    return Collective(kind, tuple(map(str, arrays)), size, group, count)


def _between_slices(instruction: Instruction, count: int) -> Collective | None:
    """A collective over the network of the data center, written as a transfer to and from the host."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    # Numbers of slices from 1, or of devices, whose first digits are the slice's.
    target = re.search(r'_xla_megascale_target=(?:"\{([\d,]+)\}|\{\{([\d,]+)\})', instruction.attributes)
    if not (kind and target):
        return None
    slices = {int(n) if target[1] else int(n) // 100_000 for n in (target[1] or target[2]).split(",")}
    array = instruction.arrays[0]
    name = kind[1].lower().replace("_", "-")
    size = array.bytes * (len(slices) if name == "reduce-scatter" else 1)
    return Collective(name + BETWEEN_SLICES, (str(array),), size, len(slices), count)


def _group(attributes: str, devices: int) -> int:
    """Number of devices in a group."""
    groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if groups:
        return int(groups[2])
    # Axes of a mesh, whose devices may be in another order, or parts of axes, as 'data':(1)4.
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2]))
    members = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if members:
        return members[1].count(",") + 1
    return 1 if "source_target_pairs={}" in attributes else devices
