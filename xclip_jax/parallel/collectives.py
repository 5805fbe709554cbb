"""What a compiled program sends between devices."""

import collections
import dataclasses
import math
import re

from xclip_jax.parallel import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
BETWEEN_SLICES = " between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`, or one with `BETWEEN_SLICES` behind it.
      shapes: what the group holds afterwards or reduces, as "f32[16,8]", for one device's group.
      bytes: payload of one execution: the array that a group gathers, reduces or passes on, counted once.
      group: devices in a group, or slices.
      count: executions in a run of the program, loops included.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: float
    group: int
    count: int

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
    """All collectives of a compiled program, `compiled.as_text()`, with the trip counts of the loops around them.

    Of a conditional the collectives of the branch with the largest payload count.

    Args:
      text: the optimised module's.
      devices: that it runs on.
    """
    program = hlo.parse(text)

    def payload(executions: list[hlo.Execution]) -> float:
        return sum(each.total for each in _distinct(program, executions, devices))

    return _distinct(program, list(program.executions(payload)), devices)


def summary(collectives: list[Collective]) -> dict[str, float]:
    """Payload in bytes by kind."""
    totals: dict[str, float] = collections.defaultdict(float)
    for each in collectives:
        totals[each.kind] += each.total
    return dict(totals)


def inside(program: hlo.Program, execution: hlo.Execution, devices: int) -> list[tuple[str, Collective]]:
    """Collectives that an instruction is or executes, each with the chain that it is a piece of, or "".

    The TPU compiler spreads a collective over the fusions that hide it: each of them has the whole collective in its
    text, and the same chain. Some may be in a loop, through which one execution goes on.
    """
    result = []
    for each in (execution, *program.inside(execution)):
        if collective := _collective(each, devices):
            chain = re.search(r'chain_id="(\d+)"', each.instruction.attributes)
            result.append((chain[1] if chain else "", collective))
    return result


def _distinct(program: hlo.Program, executions: list[hlo.Execution], devices: int) -> list[Collective]:
    """Collectives of `executions`, those of a chain as one."""
    chains: dict[object, Collective] = {}
    for execution in executions:
        for chain, collective in inside(program, execution, devices):
            key = chain or len(chains)
            if key not in chains or collective.total < chains[key].total:
                chains[key] = collective
    return list(chains.values())


def _collective(execution: hlo.Execution, devices: int) -> Collective | None:
    instruction, count, computation = execution
    if instruction.opcode == "recv":
        return _between_slices(instruction, count)
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


def _between_slices(instruction: hlo.Instruction, count: int) -> Collective | None:
    """A collective over the network of the data center, written as a transfer to and from the host."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    # Numbers of slices from 1, or of devices, whose first digits are the slice's.
    target = re.search(r'_xla_megascale_target=(?:"\{([\d,]+)\}|\{\{([\d,]+)\})', instruction.attributes)
    if not (kind and target):
        return None
    slices = {int(n) if target[1] else int(n) // 100_000 for n in (target[1] or target[2]).split(",")}
    array, name = instruction.arrays[0], kind[1].lower().replace("_", "-")
    size = array.bytes * (len(slices) if name == "reduce-scatter" else 1)
    return Collective(name + BETWEEN_SLICES, (str(array),), size, len(slices), count)


def _group(attributes: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    # Axes of a mesh, whose devices may be in another order, or parts of axes, as 'data':(1)4.
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    return 1 if "source_target_pairs={}" in attributes else devices
