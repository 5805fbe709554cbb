"""The schedules that the TPU compiler makes of the attention kernel; no TPU is used.

    pip install '.[tpu]' && JAX_PLATFORMS=cpu python -m benchmarks.kernel [v5e v6e ...]

They are a model of the chip, not a measurement: blocks follow each other without a pause, and memory is never waited
for. Takes a minute or two a chip on two cores.
"""

import argparse
import importlib.metadata
import itertools

import jax
import jax.numpy as jnp

from benchmarks.schedule import Kernel, kernel_of, schedules
from xclip_jax.core.errors import check_choice, exit_with_message
from xclip_jax.models import kernels
from xclip_jax.parallel import hlo
from xclip_jax.parallel.topology import CHIPS, devices_of

# Channels of a head, sequences, rows of each, tokens among them, channels, causal or not.
SHAPES = {
    "B/16 images": (64, 128, 200, 197, 768, False),
    "B/16 texts": (64, 128, 80, 77, 512, True),
    "L/14 images": (64, 128, 264, 257, 1024, False),
}


def compiled(chip: str, shape: tuple[int, int, int, int, int, bool]) -> tuple[Kernel, Kernel]:
    """Return the kernel and its gradient as a program for one device has them; `shape` is as in `SHAPES`."""
    where = jax.sharding.SingleDeviceSharding(devices_of(CHIPS[chip].smallest)[0][0])
    kv, b, n, tokens, d, causal = shape
    arrays = [((b, n, 3 * d), jnp.bfloat16), ((1, 3 * d), jnp.float32), ((b, n, d), jnp.bfloat16)]

    def both(qkv: jax.Array, bias: jax.Array, g: jax.Array) -> object:
        out, pullback = jax.vjp(lambda *x: kernels.attention(*x, kv, tokens, causal), qkv, bias)
        return out, pullback(g)

    inputs = (jax.ShapeDtypeStruct(*x, sharding=where) for x in arrays)
    program = hlo.parse(jax.jit(both).lower(*inputs).compile().as_text())
    calls = (kernel_of(x.instruction, program.computations[x.computation]) for x in program.executions(len))
    forward, backward = sorted(filter(None, calls), key=lambda kernel: "gradient" in kernel.name)
    return forward, backward


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", default=["v5e", "v6e", "v5p"], metavar="CHIP")
    chips = parser.parse_args().chips
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")))
    print("\n| chip, tower | pass | blocks | bundles a block | matrix slots used | HBM, MB | ms |")
    print("|---|---|---|---|---|---|---|")
    with exit_with_message():
        for chip in chips:
            check_choice("CHIP", chip, CHIPS)
            calls = {name: compiled(chip, shape) for name, shape in SHAPES.items()}
            made = schedules(chip, itertools.chain(*calls.values()))
            for name, both in calls.items():
                for way, kernel in zip(("forward", "backward"), both, strict=True):
                    if schedule := made[kernel]:
                        print(
                            f"| {chip}, {name} | {way} | {schedule.blocks:,} | {schedule.bundles:,} | "
                            f"{schedule.matrix:.0%} | {kernel.bytes / 1e6:.0f} | "
                            f"{1e3 * schedule.cycles / CHIPS[chip].clock:.2f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
