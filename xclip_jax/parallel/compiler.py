"""Options of the XLA compiler for a train step, by platform, and the order of its backward pass."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Options = Mapping[str, bool | str]
Tree = Any
_SMALL = 1 << 17  # elements: above stacks of biases, below kernels

# Sources: openxla.org/xla/flags_guidance, and MaxText's benchmarks/xla_flags_library.py (CF_FOR_ALL_REDUCE).
_TPU: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_reduce": True,
    # A gradient that ends split over the chips is one product, then scattered. By default the compiler cuts the product
    # into one slice a chip and passes partial sums round a ring: slices of 24 rows leave a matrix unit mostly idle.
    "xla_tpu_reduce_scatter_collective_matmul_mode": "none",
}
# Gradients are summed over the chips by operations that compute others: products, loops, and kernels.
_TPU_OVERLAP: Options = {
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,
    "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True,
    # Sums of larger gradients stay apart. By default the compiler joins all of them, and no product hides that sum.
    "xla_jf_crs_combiner_threshold_in_bytes": str(256 * 1024),
}
# Gradients are summed over GPUs behind the backward pass. Off by default; NVIDIA's JAX image sets it, and no other:
# docs.nvidia.com/jax-toolbox/environment-variables.
_GPUS: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
_FLAGS = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}


def _all_options(devices: Sequence[jax.Device]) -> Options:
    platform, kind = devices[0].platform, devices[0].device_kind
    if platform != "tpu":
        return _GPUS if platform == "gpu" and len(devices) > 1 else {}
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
