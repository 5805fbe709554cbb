"""Self-attention by cuDNN's fused kernels on NVIDIA GPUs: scores stay on the chip.

`xclip_jax.models.layers.attend` is the definition, and the fallback if cuDNN refuses.
"""

import functools
from typing import Literal

import einops
import jax
import jax.numpy as jnp

from xclip_jax.core.console import log0

Array = jax.Array


def attention(
    query: Array, key: Array, value: Array, *, causal: bool, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """Scaled dot-product self-attention, softmax in fp32. Three times bf16 or fp16 (b, heads, n, kv) -> the same shape.

    The `implementation` "xla" computes the same on any platform.
    """
    b, _, n, _ = query.shape

    # JAX differentiates cuDNN's attention only over an even number of tokens. The padding begins and ends here, so that
    # gradients of padded tokens, which cuDNN leaves undefined, do not reach parameters.
    def padded(x: Array) -> Array:
        return jnp.pad(einops.rearrange(x, "b heads n kv -> b n heads kv"), ((0, 0), (0, n % 2), (0, 0), (0, 0)))

    # Without lengths some versions of cuDNN compute NaN as the gradient over a number of tokens that does not fill its
    # tiles, as reports to github.com/NVIDIA/cudnn-frontend say, so they are given where nothing is padded, too.
    lengths = jnp.full((b,), n, jnp.int32)
    y = jax.nn.dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return einops.rearrange(y[:, :n], "b n heads kv -> b heads n kv")


@functools.cache
def accepts(device: jax.Device, shape: tuple[int, int, int, int], dtype: jnp.dtype, causal: bool) -> bool:
    """Whether cuDNN computes `attention` and its gradient on `device`, tested by compiling them.

    The answer depends on the versions of JAX and cuDNN and on the GPU. A refusal is printed once, and XLA computes
    `xclip_jax.models.layers.attend` instead: an optional kernel does not end a run. `shape` is (b, heads, n, kv).
    """
    if device.platform != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    gradient = jax.grad(lambda *qkv: attention(*qkv, causal=causal).astype(jnp.float32).sum(), (0, 1, 2))
    try:
        jax.jit(gradient).lower(x, x, x).compile()
    except RuntimeError as error:  # NotImplementedError and JaxRuntimeError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log0(f"WARNING: XLA computes attention over {shape[2]} tokens, slower than cuDNN, which refuses: {reason}")
        return False
    return True
