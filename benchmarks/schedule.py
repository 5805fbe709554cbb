"""Time of Pallas kernels on a TPU by their schedules, since the TPU compiler does not estimate their cycles.

A process compiles each kernel of a compiled program once more and has the compiler write its final schedule to a
folder. The length of one block's schedule is multiplied by the number of blocks: a model without pauses between blocks
and without waits for memory.
"""

import base64
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from xclip_jax.parallel import hlo
from xclip_jax.parallel.topology import CHIPS, devices_of

TARGET = 'custom_call_target="tpu_custom_call"'
_MATRIX_SLOTS = 4  # of a bundle
_UTILIZATION = "*ffi_call*final_hlo-static-per-bundle-utilization.txt"
_schedules: dict[tuple[str, "Kernel"], "Schedule | None"] = {}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel in a compiled program.

    Attributes:
      name: name of the kernel.
      operands, results: types and shapes, without layouts.
      code: code in MLIR.
      config: the call's config as JSON: the code with its source lines, which differ from call to call, and the
        author's estimate of its cost.
    """

    name: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    code: str
    config: str = dataclasses.field(compare=False)

    @property
    def bytes(self) -> float:
        """Bytes of operands and results."""
        return sum(array.bytes for text in (*self.operands, *self.results) for array in hlo.arrays(text))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of a kernel.

    Attributes:
      blocks: number of blocks of the kernel's grid.
      bundles: instructions of a block; one is issued in a cycle.
      matrix: share of the matrix units' slots that the bundles use.
      cores: number of cores that share the blocks.
    """

    blocks: int
    bundles: int
    matrix: float
    cores: int

    @property
    def cycles(self) -> float:
        """Cycles of all blocks."""
        return self.blocks * self.bundles / self.cores


def source(instruction: hlo.Instruction) -> str:
    """The path of JAX's names that an instruction comes from, "" where the compiler kept none."""
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return match[1] if match else ""


def kernel_of(instruction: hlo.Instruction, computation: hlo.Computation) -> Kernel | None:
    """Return the kernel that an instruction calls, None for another instruction."""
    if TARGET not in instruction.attributes:
        return None
    operands = tuple(str(array) for name in instruction.operands for array in computation[name].arrays)
    config = instruction.attributes.partition("backend_config=")[2]
    names = re.findall(r"\w+", source(instruction).removesuffix("/pallas_call"))
    name = names[-1] if names else instruction.name
    return Kernel(name, operands, tuple(map(str, instruction.arrays)), _code(config), config)


def schedules(chip: str, kernels: Iterable[Kernel]) -> dict[Kernel, Schedule | None]:
    """Return the schedule of each kernel on a chip, None if the compiler writes none."""
    kernels = set(kernels)
    missing = [kernel for kernel in kernels if (chip, kernel) not in _schedules]
    if missing:
        _schedules.update({(chip, kernel): x for kernel, x in zip(missing, _make(chip, missing), strict=True)})
    return {kernel: _schedules[chip, kernel] for kernel in kernels}


def _make(chip: str, kernels: list[Kernel]) -> list[Schedule | None]:
    """Compile kernels in a separate process, since the compiler reads its output folder when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        dump = f"{given} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.schedule", chip, folder],
            input=json.dumps([dataclasses.asdict(kernel) for kernel in kernels]),
            env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": dump},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "null"))]
    results = [line and Schedule(**line) for line in lines]
    return [*results, *[None] * (len(kernels) - len(results))]


def _compile(kernel: Kernel, device: Any) -> None:
    """Compile a kernel for one device."""
    where = jax.sharding.SingleDeviceSharding(device)
    operands, results = (
        [jax.ShapeDtypeStruct(x.shape, _dtype(x.dtype)) for text in texts for x in hlo.arrays(text)]
        for texts in (kernel.operands, kernel.results)
    )
    call = jax.ffi.ffi_call("tpu_custom_call", results, custom_call_api_version=1, legacy_backend_config=kernel.config)
    jax.jit(call, in_shardings=where, out_shardings=where).lower(*operands).compile()


def _dtype(name: str) -> Any:
    """NumPy's type of a type in a compiled program."""
    names = {"pred": "bool", "bf16": "bfloat16"}
    return jnp.dtype(names.get(name) or re.sub(r"^[a-z]", {"f": "float", "s": "int", "u": "uint"}[name[0]], name))


def _code(config: str) -> str:
    """The code in a call's configuration, without lines of source."""
    from jaxlib.mlir import ir  # internal to JAX, and only needed here
    from jaxlib.mosaic.python import tpu

    body = base64.b64decode(json.loads(config)["custom_call_config"]["body"])
    with ir.Context() as context:
        context.allow_unregistered_dialects = True  # the stable form of Mosaic's
        tpu.register_dialect(context)
        return str(ir.Module.parse(body))


def _read(folder: pathlib.Path, chip: str, kernel: Kernel) -> Schedule | None:
    """Read the schedule that the compiler has written, and remove the files."""
    paths = list(folder.glob(_UTILIZATION))
    rows = [line.split() for line in paths[0].read_text().splitlines()[4:] if line.strip()] if paths else []
    for path in folder.iterdir():
        path.unlink()
    if not rows:
        return None
    bounds = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", kernel.code)
    blocks = math.prod(map(int, bounds[1].split(","))) if bounds else 1
    cores = CHIPS[chip].cores if "dimension_semantics<parallel>" in kernel.code else 1
    matrix = sum(int(row[0]) for row in rows) / (_MATRIX_SLOTS * len(rows))
    return Schedule(blocks, len(rows), matrix, cores)


def main(chip: str, folder: str) -> None:
    """Print the schedules of the kernels that stdin has as JSON, one a line."""
    device = devices_of(CHIPS[chip].smallest)[0][0]
    for each in json.load(sys.stdin):
        kernel = Kernel(**each | {key: tuple(each[key]) for key in ("operands", "results")})
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no schedule then
            _compile(kernel, device)
        schedule = _read(pathlib.Path(folder), chip, kernel)
        print(json.dumps(schedule and dataclasses.asdict(schedule)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
