"""What the TPU compiler says of a train step and of the attention kernel; no TPU is used.

    pip install '.[tpu]'
    python -m benchmarks.tpu step clip:preset=B/16,batch=4096 v5e:4x8 [mesh.strategy=zero1 ...]
    python -m benchmarks.tpu kernel [v5e v6e ...]

`step` compiles the step that a run would use and prints milliseconds by part of the model: the compiler's estimated
cycles of each operation, loops unrolled, over the chip's clock; and for kernels, of which it estimates nothing, the
length of their schedule. `kernel` prints the schedules of the attention kernel. They are a model of the chip, not a
measurement. A B/16 step takes ten minutes on two cores.
"""

import argparse
import ast
import collections
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xclip_jax import flops, plan
from xclip_jax.config import load as config_file
from xclip_jax.console import format_bytes
from xclip_jax.errors import UserError, exit_with_message
from xclip_jax.kernels import attention as kernel
from xclip_jax.train import memory
from xclip_jax.train.build import Experiment

# Cycles a second; of v5e, v5p and v6e inferred from peak FLOP/s and the size of the matrix units.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNEL = "attention kernel"
_MATRIX_SLOTS = 4  # of a bundle
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?[)}\]]) ([a-z][a-z0-9\-]*)\(")
# The first pattern that is in an operation's name or source decides its row.
_PARTS = (
    ("copies", r"^copy"),
    ("stacks of a loop", r"dynamic-(update-)?slice|dynamic_(update_)?slice"),
    ("MLP", r"/mlp/"),
    ("q, k, v and output products", r"/attention/(qkv|out)/"),
    ("attention", r"/attention"),
    ("LayerNorm", r"norm"),
)


class Operation(NamedTuple):
    """An operation of a compiled program: name, source, executions, cycles of one execution, and its text."""

    name: str
    source: str
    count: int
    cycles: int
    line: str


def operations(hlo: str) -> Iterator[Operation]:
    """Yield the operations of a compiled program; of a conditional those of the branch that takes longest."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    entry = name = ""
    for line in hlo.splitlines():
        if match := _HEAD.match(line):
            name = match[2]
            entry = name if match[1] else entry
        else:
            bodies[name].append(line)
    return _walk(bodies, entry, 1)


def _walk(bodies: dict[str, list[str]], computation: str, count: int) -> Iterator[Operation]:
    for line in bodies[computation]:
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, _, kind = match.groups()
        called = functools.partial(_called, line)
        if kind == "while":
            yield from _walk(bodies, called("body")[0], count * _turns(line, bodies))
        elif kind == "call":
            yield from _walk(bodies, called("to_apply")[0], count)
        elif kind == "conditional":
            names = called("branch_computations") or called("true_computation") + called("false_computation")
            yield from max(([*_walk(bodies, branch, count)] for branch in names), key=_cycles)
        else:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            source = re.search(r'op_name="([^"]*)"', line)
            estimate = int(cycles[1]) if cycles else 0
            yield Operation(name, source[1] if source else "", count, estimate, line)


def _called(line: str, attribute: str) -> list[str]:
    match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", line)
    return [name.strip().lstrip("%") for name in (match[1] or match[2]).split(",")] if match else []


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(match[1])
    condition = "\n".join(bodies[_called(line, "condition")[0]])
    return max(map(int, re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)), default=1)


def _cycles(operations: list[Operation]) -> int:
    return sum(each.cycles * each.count for each in operations)


def part_of(operation: Operation) -> tuple[str, str]:
    """Return the tower, or "", and the row of an operation."""
    tower = re.search(r"encode_(image|text)", operation.source)
    if "tpu_custom_call" in operation.line:
        return tower[1] if tower else "", KERNEL
    text = f"{operation.name} {operation.source}"
    row = next((row for row, pattern in _PARTS if re.search(pattern, text)), "other")
    return tower[1] if tower else "", row


class Schedule(NamedTuple):
    """The schedule of a kernel: blocks of its grid, bundles of one, share of the matrix units' slots, bytes in HBM."""

    blocks: int
    bundles: int
    matrix: float
    bytes: int


class Shape(NamedTuple):
    """Sizes of the attention kernel: channels of a head, sequences, rows of each, those that count, channels."""

    kv: int
    b: int
    n: int
    tokens: int
    d: int
    causal: int


# The kernel's table.
SHAPES = {
    "B/16 images": Shape(64, 128, 200, 197, 768, 0),
    "B/16 texts": Shape(64, 128, 80, 77, 512, 1),
    "L/14 images": Shape(64, 128, 264, 257, 1024, 0),
}


@functools.cache
def schedules(chip: str, shape: Shape) -> tuple[Schedule, Schedule]:
    """Compile the kernel and its gradient in a process of its own, and read their schedules."""
    _, b, n, _, d, _ = shape
    with tempfile.TemporaryDirectory() as folder:
        dump = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        command = [sys.executable, "-m", "benchmarks.tpu", "compile", chip, *map(str, shape)]
        subprocess.run(command, env=os.environ | dump, check=True, stderr=subprocess.DEVNULL)

        def read(name: str, arrays: int, limit: int) -> Schedule:
            (path,) = pathlib.Path(folder).glob(f"*{name}*final_hlo-static-per-bundle-utilization.txt")
            bundles = [line.split() for line in path.read_text().splitlines()[4:] if line.strip()]
            blocks = b // kernel.together(b, n, limit) * d // kernel.LANES
            matrix = sum(int(bundle[0]) for bundle in bundles) / (_MATRIX_SLOTS * len(bundles))
            return Schedule(blocks, len(bundles), matrix, 2 * arrays * b * n * d)

        forward = read("-jvp_attention_.", 3 + 1, kernel.FORWARD_TOKENS)
        return forward, read("attention_gradient", 3 + 1 + 1 + 3, kernel.BACKWARD_TOKENS)


def compile_kernel(chip: str, shape: Shape) -> None:
    """Compile the kernel and its gradient for one device."""
    where = jax.sharding.SingleDeviceSharding(plan.devices_of(SMALLEST[chip])[0][0])
    kv, b, n, tokens, d, causal = shape
    arrays = [((b, n, 3 * d), jnp.bfloat16), ((1, 3 * d), jnp.float32), ((b, n, d), jnp.bfloat16)]

    def both(qkv: jax.Array, bias: jax.Array, g: jax.Array) -> object:
        out, pullback = jax.vjp(lambda *x: kernel.attention(*x, kv, tokens, bool(causal)), qkv, bias)
        return out, pullback(g)

    jax.jit(both).lower(*(jax.ShapeDtypeStruct(*x, sharding=where) for x in arrays)).compile()


def kernel_table(chips: list[str]) -> None:
    """Print the schedules of the kernel."""
    print(f"{_versions()}\n\n| chip, tower | pass | blocks | bundles a block | matrix slots used | HBM, MB | ms |")
    print("|---|---|---|---|---|---|---|")
    for chip in chips:
        for name, shape in SHAPES.items():
            for way, schedule in zip(("forward", "backward"), schedules(chip, shape), strict=True):
                ms = 1e3 * schedule.blocks * schedule.bundles / CLOCK[chip]
                print(
                    f"| {chip}, {name} | {way} | {schedule.blocks:,} | {schedule.bundles:,} | {schedule.matrix:.0%} | "
                    f"{schedule.bytes / 1e6:.0f} | {ms:.2f} |",
                    flush=True,
                )


def _kernel_cycles(operation: Operation, chip: str, experiment: Experiment) -> int:
    """Cycles of an attention kernel in a step: all bundles of its schedule, one after the other."""
    tower, _ = part_of(operation)
    config: Any = experiment.model.img if tower == "image" else experiment.model.txt
    b, n = map(int, re.findall(r"bf16\[(\d+),(\d+),", operation.line)[0])
    shape = Shape(config.width // config.heads, b, n, n, config.width, int(tower == "text"))
    schedule = schedules(chip, shape)["gradient" in operation.source]
    return schedule.blocks * schedule.bundles


def step(spec: str, topology: str, changes: dict[str, object]) -> None:
    """Print the account of a step."""
    chip = topology.partition(":")[0]
    config = config_file.load_config(spec)
    config.update_from_flattened_dict(changes)
    devices, kind = plan.devices_of(topology)
    began = time.perf_counter()
    experiment, compiled, trouble = memory.compile_config(config, devices)
    if compiled is None:
        raise UserError(f"{spec} does not fit {topology}: {trouble}")
    seconds = time.perf_counter() - began
    cells: dict[tuple[str, str], float] = collections.defaultdict(float)
    for each in operations(compiled.as_text()):
        part = part_of(each)
        cycles = _kernel_cycles(each, chip, experiment) if part[1] == KERNEL else each.cycles
        cells[part] += 1e3 * cycles * each.count / CLOCK[chip]
    towers, total = ("image", "text", ""), sum(cells.values())
    changed = "".join(f", {key}={value}" for key, value in changes.items())
    print(f"{spec} on {topology}{changed}; {_versions()}; compiled in {seconds:.0f} s\n")
    print("| ms | image | text | neither | sum |\n|---|---|---|---|---|")
    for row in sorted({row for _, row in cells}, key=lambda row: -sum(cells[tower, row] for tower in towers)):
        values = [cells[tower, row] for tower in towers]
        print(f"| {row} | {' | '.join(f'{x:.1f}' for x in (*values, sum(values)))} |")
    work = flops.train_step(experiment.config, rows=experiment.text_rows[0]) or 0.0
    peak = 1e3 * work / kind.peak / len(devices)
    print(f"\n{total:.1f} ms; at the peak the model's FLOPs take {peak:.1f} ms: an MFU of {peak / total:.0%} at most")
    for name, n in memory.usage(experiment, compiled).items():
        print(f"{name} {format_bytes(n)}")


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_step = commands.add_parser("step")
    of_step.add_argument("recipe")
    of_step.add_argument("topology")
    of_step.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    commands.add_parser("kernel").add_argument("chips", nargs="*", default=["v5e", "v6e", "v5p"])
    of_kernel = commands.add_parser("compile")  # started by `schedules`
    of_kernel.add_argument("chip")
    of_kernel.add_argument("shape", nargs=len(Shape._fields), type=int)
    options = parser.parse_args()
    with exit_with_message():
        if options.command == "step":
            pairs = (change.partition("=") for change in options.changes)
            step(options.recipe, options.topology, {key: _value(value) for key, _, value in pairs})
        elif options.command == "kernel":
            kernel_table(options.chips)
        else:
            compile_kernel(options.chip, Shape(*options.shape))


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
