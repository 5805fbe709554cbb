"""What a compiled program sends between devices, read off its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_OP = re.compile(rf"=\s*(\(.*?\)|\S+)\s+({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NAMES = r"=\{?([^}\s,]+(?:, *%[^}\s,]+)*)"
_CALLED = re.compile(rf"\b(?:body|condition|calls|to_apply|called_computations){_NAMES}")
_BRANCHES = re.compile(rf"\b(?:branch_computations|true_computation|false_computation){_NAMES}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      shapes: what the group holds afterwards or reduces, as "f32[16,8]", for one device's group.
      bytes: payload of one execution: the array that a group gathers, reduces or passes on, counted once.
      group: devices in a group.
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


def _group(line: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    return 1 if "source_target_pairs={}" in line else devices


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(text)]


def _operation(line: str, devices: int, count: int) -> Collective | None:
    match = _OP.search(line)
    if not match:
        return None
    result, kind, start = match.groups()
    arrays = _arrays(result)
    if start and kind != "all-reduce":
        # An asynchronous start returns operands and results, and on TPUs some flags.
        arrays = [x for x in arrays if x[1]]
        arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
    group = _group(line, devices)
    if group == 1:
        return None
    whole = group if kind == "reduce-scatter" else 1
    size = whole * sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in arrays)
    shapes = tuple(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in arrays)
    return Collective(kind, shapes, size, group, count)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program, `compiled.as_text()`, with the trip counts of the loops around them.

    Of a conditional those of the branch with the largest payload count.

    Args:
      hlo: the optimised module's text.
      devices: that it runs on.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _HEAD.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return list(_by_channel(_walk(bodies, entry, devices, 1)).values())


def _by_channel(operations: Iterable[tuple[str, Collective]]) -> dict[str, Collective]:
    # The TPU compiler spreads a collective over other work and writes it several times, under one channel; some of the
    # places may be in a loop, through which one execution goes on.
    channels: dict[str, Collective] = {}
    for channel, operation in operations:
        known = channels.setdefault(channel, operation)
        if operation.total < known.total:
            channels[channel] = operation
    return channels


def _walk(bodies: dict[str, list[str]], name: str, devices: int, count: int) -> Iterator[tuple[str, Collective]]:
    for line in bodies.get(name, ()):
        if operation := _operation(line, devices, count):
            channel = re.search(r"channel_id=(\d+)", line)
            yield channel[1] if channel else f"{name}{line}", operation
            continue  # what it applies is a sum of two numbers
        if "=" not in line:
            continue
        trips = _trips(line, bodies) if " while(" in line else 1
        for called in _called(_CALLED, line):
            yield from _walk(bodies, called, devices, count * trips)
        branches = [_by_channel(_walk(bodies, branch, devices, count)) for branch in _called(_BRANCHES, line)]
        if branches:
            yield from max(branches, key=lambda branch: sum(x.total for x in branch.values())).items()


def _called(attributes: re.Pattern[str], line: str) -> list[str]:
    """Names of the computations that an instruction calls by these attributes."""
    return [name.lstrip("%") for names in attributes.findall(line) for name in re.split(r", *", names)]


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: the compiler's note, else the number that its condition compares with; 1 if neither."""
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bounds = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(bounds, default=1)


def summary(collectives: list[Collective]) -> dict[str, float]:
    """Payload in bytes by kind."""
    totals: dict[str, float] = collections.defaultdict(float)
    for each in collectives:
        totals[each.kind] += each.total
    return dict(totals)
