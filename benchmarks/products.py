"""GFLOP/s of the matrix products of a step of `benchmarks.step`, by XLA and by torch, each alone on all cores.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.products

A line for each size (rows, inputs, outputs) of a linear map: forward x W, gradient of the input g W^T, and gradient of
the kernel x^T g, as `xclip_jax.models.layers.matmul` computes it. Medians of 30.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import torch

from xclip_jax.models.layers import matmul

SIZES = [(8192, 192, 768), (8192, 192, 576), (8192, 192, 192), (4352, 192, 768)]
TIMES = 30


def seconds(run: Callable[[], object]) -> float:
    """Return the median time of `run`, after a first call."""
    run()
    measured = []
    for _ in range(TIMES):
        began = time.perf_counter()
        run()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured)


def measured(rows: int, inputs: int, outputs: int) -> Iterator[tuple[str, float, float]]:
    """Yield (product, XLA's GFLOP/s, torch's)."""
    rng = np.random.default_rng(0)
    shapes = ((rows, inputs), (inputs, outputs), (rows, outputs))
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    x, w, g = (torch.from_numpy(a) for a in arrays)
    on_device = [jax.device_put(a) for a in arrays]
    pairs: dict[str, tuple[Callable[..., jax.Array], Callable[[], object]]] = {
        "forward": (lambda x, w, g: matmul(x, w), lambda: x @ w),
        "input": (lambda x, w, g: jax.vjp(lambda x: matmul(x, w), x)[1](g)[0], lambda: g @ w.T),
        "kernel": (lambda x, w, g: jax.vjp(lambda w: matmul(x, w), w)[1](g)[0], lambda: x.T @ g),
    }
    work = 2e-9 * rows * inputs * outputs
    for name, (ours, theirs) in pairs.items():
        compiled = jax.jit(ours)
        yield name, work / seconds(lambda f=compiled: f(*on_device).block_until_ready()), work / seconds(theirs)


def main() -> None:
    """Print the lines."""
    for rows, inputs, outputs in SIZES:
        rates = ", ".join(
            f"{name} {ours:.0f} to torch's {theirs:.0f}" for name, ours, theirs in measured(rows, inputs, outputs)
        )
        print(f"{rows:,} x {inputs} x {outputs}: {rates}", flush=True)


if __name__ == "__main__":
    main()
