"""What a train step on two TPU slices sends between them, by the program that libtpu compiles; no TPU is used.

    JAX_PLATFORMS=cpu python -m benchmarks.slices clip:preset=B/16,batch=128 v5e:2x2 model.img.depth=2 model.txt.depth=2

Arguments are a recipe, the topology of one slice, and keys of whole numbers. Minutes for each of three strategies.
"""

import collections
import importlib.metadata
import math
import re
import sys

from absl import logging

from xclip_jax import plan
from xclip_jax.config import load as config_file
from xclip_jax.console import format_bytes
from xclip_jax.train import memory

SLICES = 2
# The transfers of the runtime that joins slices: a chip's part, to the chip of the same place in the other slice.
_SEND = re.compile(r"= \((\w+)\[([\d,]*)\]\S* [^=]*? send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def between_slices(program: str) -> dict[str, int]:
    """{kind of collective: bytes that a chip sends to another slice} in a compiled step."""
    sent: dict[str, int] = collections.Counter()
    for line in program.splitlines():
        if " send(" in line:
            dtype, shape, kind = _SEND.search(line).groups()
            sent[kind] += _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return dict(sent)


def main(recipe: str, topology: str, *changes: str) -> None:
    """Prints a row for each strategy."""
    logging.set_verbosity(logging.ERROR)
    devices, _ = plan.devices_of(topology, SLICES)
    chips = len(devices) // SLICES
    version = importlib.metadata.version("libtpu")
    print(f"{recipe} on {SLICES} x {topology}, libtpu {version}: bytes that a chip sends to the other slice")
    for strategy, fsdp in (("dp", 1), ("zero1", 1), ("zero1", chips)):
        config = config_file.load_config(recipe)
        for key, _, value in (change.partition("=") for change in changes):
            config.update_from_flattened_dict({key: int(value)})
        config.mesh.strategy, config.mesh.fsdp, config.data.length_groups = strategy, fsdp, "full"
        _, compiled, trouble = memory.compile_config(config, devices)
        sent = {} if trouble else between_slices(compiled.as_text())
        parts = ", ".join(f"{format_bytes(n)} {kind.lower()}" for kind, n in sorted(sent.items()))
        print(f"{strategy}, mesh.fsdp={fsdp}: {trouble or format_bytes(sum(sent.values()))} ({parts})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
