"""What the TPU compiler says of a contrastive loss alone, plain and on a ring; no TPU is used.

    pip install '.[tpu]'
    JAX_PLATFORMS=cpu python -m benchmarks.ring v5e:8x16 131072 [--embed 512] [--form sigmoid]

Compiles value and gradients for a batch that is split over the chips of a topology, and prints for one chip the peak of
its memory, what its permutes send, and milliseconds: the compiler's estimated cycles of each operation, loops unrolled,
over the chip's clock. Time on the links is not in them. They are a model of the chip, not a measurement.
"""

import argparse
import functools
import importlib.metadata
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.schedule import source
from xclip_jax.core.errors import exit_with_message
from xclip_jax.losses import contrastive, ring
from xclip_jax.parallel import compiler, hlo
from xclip_jax.parallel.hlo import inside
from xclip_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from xclip_jax.parallel.topology import CHIPS, devices_of

MIB = 2**20


def compile_loss(form: str, impl: str, batch: int, embed: int, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Compile the value and all gradients of a loss.

    Args:
      form: "softmax" or "sigmoid".
      impl: "plain" or "ring".
      batch: pairs in all.
      embed: size of an embedding.
      devices: that the batch is split over.
    """
    mesh = make_mesh({"data": len(devices), "fsdp": 1, "model": 1}, list(devices))
    loss = getattr(contrastive, form) if impl == "plain" else functools.partial(getattr(ring, form), mesh=mesh)
    z = jax.ShapeDtypeStruct((batch, embed), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    args = (z, z, scalar) if form == "softmax" else (z, z, scalar, scalar)
    gradients = jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True)
    out = ((replicated(mesh), replicated(mesh)), tuple(x.sharding for x in args))
    options = dict(compiler.options(devices))
    return jax.jit(gradients, out_shardings=out, compiler_options=options).lower(*args).compile()


def row(form: str, impl: str, batch: int, embed: int, topology: str) -> str:
    """Return a row of the table."""
    devices, _ = devices_of(topology)
    try:
        compiled = compile_loss(form, impl, batch, embed, devices)
    except jax.errors.JaxRuntimeError as error:
        return f"| {impl} | {str(error).splitlines()[0]} | | | |"
    program = hlo.parse(compiled.as_text())
    executions = [*program.executions(lambda branch: sum(x.instruction.cycles for x in branch))]
    # One hop alone, the first, takes the branch in which pairs match.
    cycles = sum(x.instruction.cycles * (1 if "/cond/" in source(x.instruction) else x.count) for x in executions)
    sent = [each for x in executions for _, each in inside(program, x, len(devices))]
    permutes = [each for each in sent if each.kind == "collective-permute"]
    cells = (
        f"{compiled.memory_analysis().peak_memory_in_bytes / MIB:,.0f}",
        f"{sum(each.count for each in permutes):,}",
        f"{sum(each.total for each in permutes) / MIB:,.0f}",
        f"{1e3 * cycles / CHIPS[topology.partition(':')[0]].clock:,.1f}",
    )
    return f"| {impl} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("batch", type=int)
    parser.add_argument("--embed", type=int, default=512)
    parser.add_argument("--form", choices=("softmax", "sigmoid"), default="softmax")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    with exit_with_message():
        print(f"{options.form}, {options.batch:,} pairs of {options.embed} on {options.topology}; {versions}\n")
        print("| form | peak, MiB | permutes | they send, MiB | ms by cycles |\n|---|---|---|---|---|")
        for impl in ("plain", "ring"):
            print(row(options.form, impl, options.batch, options.embed, options.topology), flush=True)


if __name__ == "__main__":
    main()
