"""The XLA compiler: options of a train step by platform, the order of its backward pass, and the cache of programs."""

import hashlib
import os
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xclip_jax.core.console import log0
from xclip_jax.core.run_folder import RunReader
from xclip_jax.core.storage import cache_dir, is_remote

CACHE_BYTES = 2 * 2**30
# Programs that compile faster are not kept: thousands of small files would make each look-up slow.
CACHE_SECONDS = 0.1

Options = Mapping[str, bool | str]
Tree = Any
_SMALL = 1 << 17  # elements: above stacks of biases, below kernels

# Sources: openxla.org/xla/flags_guidance, and MaxText's benchmarks/xla_flags_library.py (CF_FOR_ALL_REDUCE).
_TPU: Options = {
    # A collective runs in parts beside the operations that hide it.
    "xla_tpu_enable_async_collective_fusion": True,
    # A core computes while a collective is on the links.
    "xla_tpu_overlap_compute_collective_tc": True,
    # An all-reduce has a start and an end, and other operations run between them.
    "xla_enable_async_all_reduce": True,
    # A gradient that ends split over the chips is one product, then scattered. By default the compiler cuts the product
    # into one slice a chip and passes partial sums round a ring: slices of 24 rows leave a matrix unit mostly idle.
    "xla_tpu_reduce_scatter_collective_matmul_mode": "none",
}
_TPU_OVERLAP: Options = {
    # All-reduces, which sum the gradients, are hidden too.
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    # One collective spans several operations.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    # Loops hide collectives, not only products.
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,
    # Pallas kernels hide them too.
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    # Larger all-reduces are not combined. By default all are, and no product is left to hide the combined one.
    "xla_jf_crs_combiner_threshold_in_bytes": str(256 * 1024),
}
# All-reduces overlap with the backward pass. Off by default, and the only flag that NVIDIA's JAX image sets:
# docs.nvidia.com/jax-toolbox/environment-variables.
_GPUS: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
_FLAGS = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


def _all_options(devices: Sequence[jax.Device]) -> Options:
    kind = devices[0].device_kind
    if devices[0].platform != "tpu":
        return _GPUS if devices[0].platform == "gpu" and len(devices) > 1 else {}
    # A core has 16 MiB of vector memory up to v4, which products fused with sums exceed, and 64 MiB or more since v5.
    return _TPU if kind.startswith(("TPU v2", "TPU v3", "TPU v4")) else {**_TPU, **_TPU_OVERLAP}


def options(devices: Sequence[jax.Device]) -> Options:
    """Return options for a program on `devices` that this version of the compiler knows.

    Options that the environment variable LIBTPU_INIT_ARGS (TPU) or XLA_FLAGS (GPU) sets are left out.
    """
    flags = os.environ.get(_FLAGS.get(devices[0].platform, ""), "")
    given = {flag.lstrip("-").partition("=")[0] for flag in flags.split()}
    device = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    return {
        name: value
        for name, value in _all_options(devices).items()
        if name not in given and _accepts({name: value}, device)
    }


def _accepts(options: Options, device: jax.Device) -> bool:
    """Whether the compiler knows `options`, tested by compiling a sum."""
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
    """Return (x, after); in the backward pass the gradient of `x` waits until the gradient of `after` is complete.

    The compiler would otherwise postpone the gradients of all kernels to the end of the backward pass, where one hides
    the sum of another over devices, and keep the activations of all blocks until then.
    """
    return x, after


ordered.defvjp(lambda x, after: ((x, after), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def ordered_after_small(x: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Return (x, params); the gradient of `x` waits until the gradients of the small `params` are complete.

    Kernels are left out: `x` would have to wait for their sums over devices.
    """
    leaves, structure = jax.tree.flatten(params)
    small = {i: leaf for i, leaf in enumerate(leaves) if leaf.size < _SMALL}
    x, small = ordered(x, small)
    return x, structure.unflatten(small.get(i, leaf) for i, leaf in enumerate(leaves))


def enable_cache(run: str = "") -> None:
    """Turn JAX's persistent compilation cache on: a command that is started again need not compile again.

    Call it before anything is compiled and after `processes.runtime.join`; JAX's own variables have precedence. The
    folder is JAX_COMPILATION_CACHE_DIR if it is set, else `cache_folder()` with at most `CACHE_BYTES`. A folder that
    cannot be used is a warning.

    Args:
      run: folder of a run of several processes. They use `compiled` in it, since only process 0 writes (on CPUs only
        process 0 reads, too).
    """
    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return
    named = config.jax_compilation_cache_dir
    folder = named or str(RunReader(run).compiled if run else cache_folder())
    try:
        if not is_remote(folder) and (named or not run):  # a run makes its own folder
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        log0(f"WARNING: no compilation cache ({error.strerror}: {folder}); set JAX_COMPILATION_CACHE_DIR to a folder")
        return
    if named:
        return
    _set("jax_compilation_cache_dir", folder)
    _set("jax_persistent_cache_min_compile_time_secs", CACHE_SECONDS)
    if not run:
        _set("jax_compilation_cache_max_size", CACHE_BYTES)
    elif is_remote(folder):  # XLA's own caches want a disk
        _set("jax_persistent_cache_enable_xla_caches", "none")


def cache_folder() -> pathlib.Path:
    """Return `compiled/CPU` in the cache of `core.storage.cache_dir`; CPU names this kind of processor.

    Machines that share a home need not have the same processors, and code for one may not run on another.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return cache_dir() / "compiled" / f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _set(name: str, value: Any) -> None:
    """Set an option of JAX, unless the environment does."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)
