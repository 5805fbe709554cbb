"""The XLA compiler: options of a train step by platform, the order of its backward pass, and the cache of programs."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xclip_jax.core.storage import cache_dir

CACHE_BYTES = 2 * 2**30
# Shortest compilation to cache: thousands of small files would slow down each look-up.
CACHE_SECONDS = 0.1

Options = Mapping[str, bool | str]
Tree = Any
_SMALL = 1 << 17  # elements: above stacks of biases, below kernels

# Sources: openxla.org/xla/flags_guidance, and MaxText's benchmarks/xla_flags_library.py (CF_FOR_ALL_REDUCE).
_TPU: Options = {
    # Split collectives into parts that run next to the operations that hide them.
    "xla_tpu_enable_async_collective_fusion": True,
    # Compute while a collective is on the links.
    "xla_tpu_overlap_compute_collective_tc": True,
    # Give all-reduces a start and an end, with other operations between them.
    "xla_enable_async_all_reduce": True,
    # Compute a scattered gradient as one product. By default the compiler cuts it into one slice per chip and passes
    # partial sums round a ring: slices of 24 rows leave a matrix unit mostly idle.
    "xla_tpu_reduce_scatter_collective_matmul_mode": "none",
}
_TPU_OVERLAP: Options = {
    # Hide all-reduces, which sum the gradients, too.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    # Let one collective span several operations.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    # Hide collectives behind loops, in addition to products.
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,
    # Hide them behind Pallas kernels.
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    # Keep larger all-reduces apart. By default all are combined, and no product remains to hide the combined one.
    "xla_jf_crs_combiner_threshold_in_bytes": str(256 * 1024),
}
# For the kernels of `models.block_kernels`, which fill most of the vector memory. Of 128 MiB one operation may take 96,
# by default 32, so that a kernel can hide a collective. With 64 MiB a kernel leaves no room for one.
_LARGE: Options = {"xla_tpu_scoped_vmem_limit_kib": str(96 << 10)}
_TPU_KINDS: Mapping[str, Options] = {
    "TPU v5 lite": _LARGE,
    "TPU v6 lite": _LARGE,
    "TPU7x": {"xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": False},
}
# Overlaps all-reduces with the backward pass. Off by default, and the only flag of NVIDIA's JAX image:
# docs.nvidia.com/jax-toolbox/environment-variables.
_GPUS: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
_FLAGS = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


def options(devices: Sequence[jax.Device]) -> Options:
    """Return options for a program on `devices` that this version of the compiler accepts.

    Options in the environment variable LIBTPU_INIT_ARGS (TPU) or XLA_FLAGS (GPU) are left out.
    """
    kind = devices[0].platform
    possible: Options = _GPUS if kind == "gpu" and len(devices) > 1 else {}
    if kind == "tpu":
        # Cores up to v4 have 16 MiB of vector memory, too little for products fused with sums; since v5 at least 64.
        old = devices[0].device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
        possible = _TPU if old else {**_TPU, **_TPU_OVERLAP, **_TPU_KINDS.get(devices[0].device_kind, {})}
    given = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get(_FLAGS.get(kind, ""), "").split()}
    device = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    return {name: x for name, x in possible.items() if name not in given and _accepts({name: x}, device)}


def _accepts(options: Options, device: jax.Device) -> bool:
    """Return whether the compiler knows `options`, tested by compiling a sum."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    program: Any = jax.jit(lambda x: x + 1, compiler_options=dict(options))
    try:
        program.lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@jax.custom_vjp
def ordered(x: Tree, after: Tree) -> tuple[Tree, Tree]:
    """Return (x, after); in the backward pass the gradient of `x` waits for the gradient of `after`.

    Otherwise the compiler postpones the gradients of all kernels to the end of the backward pass, with nothing left to
    hide their sums over devices, and keeps the activations of all blocks until then.
    """
    return x, after


ordered.defvjp(lambda x, after: ((x, after), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def ordered_after_small(x: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Return (x, params); the gradient of `x` waits for the gradients of small `params`, but not of kernels."""
    leaves, structure = jax.tree.flatten(params)
    small = {i: leaf for i, leaf in enumerate(leaves) if leaf.size < _SMALL}
    x, small = ordered(x, small)
    return x, structure.unflatten(small.get(i, leaf) for i, leaf in enumerate(leaves))


def enable_cache() -> None:
    """Turn on JAX's persistent compilation cache, so that a restarted command does not compile again.

    Call it before anything is compiled. The folder is JAX_COMPILATION_CACHE_DIR if set, else `compiled` in
    `core.storage.cache_dir` with at most `CACHE_BYTES`; JAX's other environment variables have precedence, too. Keys
    contain the kind of processor, so that machines may share a home.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir:
        return
    config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    limits = {
        "jax_compilation_cache_max_size": CACHE_BYTES,
        "jax_persistent_cache_min_compile_time_secs": CACHE_SECONDS,
    }
    for name, value in limits.items():
        if name.upper() not in os.environ:
            config.update(name, value)
