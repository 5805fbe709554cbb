"""Attention kernels that keep scores on the chip: our own for short sequences on TPUs, and cuDNN's on NVIDIA GPUs.

XLA writes the fp32 scores (b, heads, n, n) to HBM and reads them again in each pass of the softmax, which takes longer
than all matrix products of a block. The TPU kernel, `attention`, holds all scores of one head of one image in vector
memory, and its backward pass recomputes them from queries and keys.

Queries, keys and values are one array of groups of 128 lanes, (b, n, groups * 3 * 128). Each group contains the
queries, keys and values of either one head of 128 channels or two heads of 64. One block of the grid is one group of a
few sequences, so nothing is transposed or padded in HBM, and one matrix product makes the whole array (`group_heads`
orders its weights). Lane masks separate two heads in 128 lanes, at a lower cost than slices of half a vector.

`xclip_jax.models.layers.attend` is the definition, and the fallback if cuDNN refuses.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xclip_jax.core.console import log0

Array = jax.Array
LANES = 128
HEADS = (64, 128)  # channels per head
SUBLANES = 8  # multiples of it as token counts need no change of layout around the kernel
OUTPUT = "attention"  # name of the output, for policies of `jax.checkpoint`
MAX_TOKENS = 640  # scores of longer sequences exceed a kernel's default vector memory
# Tokens per block: more sequences hide each other's latency but take longer to compile.
FORWARD_TOKENS, BACKWARD_TOKENS = 1024, 512
_MASKED = -1e30  # finite, so that a row without a key stays finite


def fits(tokens: int, heads: int, width: int) -> bool:
    """Return whether `attention` supports `tokens` tokens and `heads` heads over `width` channels."""
    return width // heads in HEADS and width % LANES == 0 and tokens <= MAX_TOKENS


def group_heads(x: Array) -> Array:
    """Order query, key and value channels for `attention`, (..., 3, heads, kv) -> (..., 3 * d)."""
    together = LANES // x.shape[-1]
    return einops.rearrange(x, "... three (groups heads) kv -> ... (groups three heads kv)", heads=together)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def attention(qkv: Array, bias: Array, kv: int, tokens: int, causal: bool, interpret: bool = False) -> Array:
    """Compute scaled dot-product self-attention with an fp32 softmax; return the concatenated heads, (b, n, d).

    Args:
      qkv: queries, keys and values before their bias, (b, n, 3 * d), ordered by `group_heads`.
      bias: their bias in the same order, fp32 (1, 3 * d).
      kv: channels per head, one of `HEADS`.
      tokens: number of real tokens; they ignore the padding after them, whose outputs are arbitrary but finite.
      causal: whether tokens attend only to themselves and earlier tokens.
      interpret: whether to run as plain JAX operations, on any platform.
    """
    return _forward(qkv, bias, kv, tokens, causal, interpret)[0]


def _forward(
    qkv: Array, bias: Array, kv: int, tokens: int, causal: bool, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    kernel = functools.partial(_forward_kernel, kv=kv, tokens=tokens, causal=causal)
    (out,) = _call(kernel, (qkv, bias), (_like(qkv, 3),), FORWARD_TOKENS, 2, kv, interpret, "attention")
    out = checkpoint_name(out, OUTPUT)
    return out, (qkv, bias, out)


def _backward(
    kv: int, tokens: int, causal: bool, interpret: bool, residuals: tuple[Array, Array, Array], g: Array
) -> tuple[Array, ...]:
    kernel = functools.partial(_backward_kernel, kv=kv, tokens=tokens, causal=causal)
    qkv, bias, out = residuals
    outputs = (_like(qkv), _like(bias))
    gradients = _call(kernel, (qkv, bias, out, g), outputs, BACKWARD_TOKENS, 5, kv, interpret, "attention_gradient")
    return tuple(gradients)


attention.defvjp(_forward, _backward)


def _like(x: Array, parts: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // parts), x.dtype)


def _call(
    kernel: Callable[..., None],
    inputs: tuple[Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    block_tokens: int,
    products: int,
    kv: int,
    interpret: bool,
    name: str,
) -> list[Array]:
    """Call `kernel` on blocks of one group and a few sequences; a two-dimensional input has one row for all."""
    b, n, channels = inputs[0].shape
    sequences = math.gcd(b, max(1, block_tokens // n // 2 * 2))

    def spec(x: Any) -> pl.BlockSpec:
        lanes = LANES * 3 * x.shape[-1] // channels
        if len(x.shape) == 2:
            return pl.BlockSpec((1, lanes), lambda group, i: (0, group))
        return pl.BlockSpec((sequences, n, lanes), lambda group, i: (i, 0, group))

    heads = channels // 3 // kv
    cost = pl.CostEstimate(
        flops=products * 2 * b * heads * n * n * LANES,
        transcendentals=b * heads * n * n,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *outputs)),
    )
    return pl.pallas_call(
        kernel,
        grid=(channels // (3 * LANES), b // sequences),
        in_specs=[spec(x) for x in inputs],
        out_specs=[spec(x) for x in outputs],
        out_shape=outputs,
        # Sequences run in order, so one block accumulates their bias gradients.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )(*inputs)


def clear(sums: Sequence[Any]) -> None:
    """Set sums to zero in the first of the blocks that add to them."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiply matrices over the dimensions `contract` of `a` and `b`, and return fp32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _part(part: int) -> slice:
    """Return the lanes of queries (0), keys (1) or values (2) in a block."""
    return slice(part * LANES, (part + 1) * LANES)


def _operands(qkv: Any, bias: Any, i: int, kv: int) -> tuple[Array, Array, Array]:
    """Return scaled queries, keys and values of sequence `i` in a block, each (n, 128)."""
    dtype = qkv.dtype
    query, key, value = (qkv[i, :, _part(part)] + bias[:, _part(part)].astype(dtype) for part in range(3))
    return query * jnp.asarray(kv**-0.5, dtype), key, value


def _only(x: Array, head: int, kv: int) -> Array:
    """Zero `x` (n, 128) outside the lanes of `head`."""
    return x if kv == LANES else jnp.where(_lanes(head, kv), x, jnp.zeros_like(x))


def _lanes(head: int, kv: int) -> Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane >= head * kv) & (lane < (head + 1) * kv)


def _exponentials(query: Array, key: Array, tokens: int, causal: bool) -> tuple[Array, Array]:
    """Return the unnormalised softmax of a head's scores, fp32 (n, n), and the reciprocals of its sums, (n, 1)."""
    scores = dot(query, key, (1, 1))
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    if causal:
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(column <= row, scores, _MASKED)
    elif tokens < scores.shape[1]:
        scores = jnp.where(column < tokens, scores, _MASKED)
    e = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return e, 1 / jnp.sum(e, axis=1, keepdims=True)


def _forward_kernel(qkv: Any, bias: Any, out: Any, *, kv: int, tokens: int, causal: bool) -> None:
    for i in range(qkv.shape[0]):
        query, key, value = _operands(qkv, bias, i, kv)
        result = jnp.zeros(query.shape, jnp.float32)
        for head in range(LANES // kv):
            e, reciprocal = _exponentials(_only(query, head, kv), key, tokens, causal)
            # Normalising after the product divides n x 128 numbers instead of n x n.
            attended = dot(e.astype(value.dtype), value, (1, 0)) * reciprocal
            result = attended if kv == LANES else jnp.where(_lanes(head, kv), attended, result)
        out[i] = result.astype(out.dtype)


def _backward_kernel(
    qkv: Any, bias: Any, out: Any, g: Any, grad_qkv: Any, grad_bias: Any, *, kv: int, tokens: int, causal: bool
) -> None:
    clear([grad_bias])
    for i in range(qkv.shape[0]):
        query, key, value = _operands(qkv, bias, i, kv)
        g_out = g[i].astype(jnp.float32)
        weighted = g_out * out[i].astype(jnp.float32)
        grad_query, grad_key, grad_value = (jnp.zeros(query.shape, jnp.float32) for _ in range(3))
        for head in range(LANES // kv):
            head_query = _only(query, head, kv)
            e, reciprocal = _exponentials(head_query, key, tokens, causal)
            scaled = _only(g_out, head, kv) * reciprocal
            mean = jnp.sum(_only(weighted, head, kv), axis=1, keepdims=True) * reciprocal
            scaled = scaled.astype(query.dtype)
            grad_value += dot(e.astype(query.dtype), scaled, (0, 0))
            grad_scores = (e * (dot(scaled, value, (1, 1)) - mean)).astype(query.dtype)
            grad_key += dot(grad_scores, head_query, (0, 0))
            grad_head = dot(grad_scores, key, (1, 0))
            grad_query = grad_head if kv == LANES else jnp.where(_lanes(head, kv), grad_head, grad_query)
        for part, x in enumerate((grad_query * kv**-0.5, grad_key, grad_value)):
            grad_qkv[i, :, _part(part)] = x.astype(grad_qkv.dtype)
            grad_bias[:, _part(part)] += jnp.sum(x, axis=0, keepdims=True)


def cudnn_attention(
    query: Array, key: Array, value: Array, *, causal: bool, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """Compute scaled dot-product self-attention by cuDNN; bf16 or fp16 (b, heads, n, kv), three times -> once.

    The softmax is in fp32. The `implementation` "xla" computes the same on any platform.
    """
    b, _, n, _ = query.shape

    # JAX differentiates cuDNN's attention only for an even number of tokens. cuDNN leaves the gradients of padding
    # undefined; padding and slicing here keeps them away from the parameters.
    def padded(x: Array) -> Array:
        return jnp.pad(einops.rearrange(x, "b heads n kv -> b n heads kv"), ((0, 0), (0, n % 2), (0, 0), (0, 0)))

    # Lengths are given even without padding: if they are missing and the tokens do not fill its tiles, some versions of
    # cuDNN return NaN gradients (reports at github.com/NVIDIA/cudnn-frontend).
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
def cudnn_accepts(device: jax.Device, shape: tuple[int, int, int, int], dtype: jnp.dtype, causal: bool) -> bool:
    """Return whether cuDNN compiles `cudnn_attention` and its gradient for arrays of `shape` (b, heads, n, kv).

    The answer depends on the versions of JAX and cuDNN and on the GPU. A refusal is printed once, and the run continues
    with `layers.attend`.
    """
    if device.platform != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    gradient = jax.grad(lambda *qkv: cudnn_attention(*qkv, causal=causal).astype(jnp.float32).sum(), (0, 1, 2))
    try:
        jax.jit(gradient).lower(x, x, x).compile()
    except RuntimeError as error:  # includes NotImplementedError and JaxRuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log0(f"WARNING: XLA computes attention over {shape[2]} tokens, slower than cuDNN, which refuses: {reason}")
        return False
    return True
