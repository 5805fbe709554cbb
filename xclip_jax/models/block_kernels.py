"""TPU kernels for the products of a transformer block, whose norms and hidden units stay on the chip.

    project   norm(x) @ kernel: queries, keys and values of a block's attention
    finish    y = x + attended @ out, then y + down(act(up(norm(y))))

XLA writes the normalised rows, and the hidden units before and after the activation, to HBM, and computes norms and
activations while no product runs. A kernel keeps its weights in vector memory and passes over the rows once. It makes
hidden units in chunks, so that the activation of one chunk overlaps the products of another. Backward passes recompute
norms and hidden units from the inputs, and sum the gradients of the weights in fp32 in vector memory.

`xclip_jax.models.transformer.Block` has the definitions, used for sizes without `fits`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xclip_jax.models.kernels import LANES, clear, dot

Array = jax.Array
Activation = Callable[[Array], Array]

# Most bytes of vector memory for a kernel, of 128 and 64 MiB per core. v4 and v5p are left out: XLA finds no room for
# collectives between the kernels.
MEMORY = {"TPU v5 lite": 100 << 20, "TPU v6 lite": 100 << 20, "TPU7x": 50 << 20}
PROJECTED = "projected"  # name of the result of `project`, for policies of `jax.checkpoint`
ROWS, LEAST_ROWS = 512, 256  # most and fewest rows per block of a grid
CHUNK = 768  # most hidden units per chunk


def fits(kind: str, rows: int, width: int, hidden: int, cores: int) -> bool:
    """Return whether the kernels support `rows` rows on a device of a `kind`, by its memory and the blocks' sizes."""
    # Weights in bf16, their gradients in fp32, and a few arrays of a block's rows in fp32.
    needed = 6 * width * (2 * hidden + width) + 4 * ROWS * (8 * width + 4 * CHUNK)
    divides = rows % (LEAST_ROWS * cores) == 0 and width % LANES == 0 and hidden % LANES == 0
    return divides and needed <= MEMORY.get(kind, 0)


class Norm(NamedTuple):
    """Parameters of a LayerNorm, fp32 (1, d)."""

    scale: Array
    offset: Array


class Weights(NamedTuple):
    """Weights of `finish`; kernels in the rows' dtype, (inputs, outputs), and biases in fp32, (1, outputs)."""

    out: Array
    out_bias: Array
    scale: Array
    offset: Array
    up: Array
    up_bias: Array
    down: Array
    down_bias: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def project(
    x: Array, norm: Norm, kernel: Array, eps: float, cores: int, interpret: bool = False
) -> tuple[Array, Array]:
    """Compute norm(x) @ kernel, (rows, d) -> (rows, outputs), and return it with `x` for the residual branch.

    The kernel of the backward pass adds the gradients of both, which XLA would do in a pass of its own.

    `x` and `kernel` (d, outputs) have the dtype of the product, `eps` is added to the variance, and `cores` is their
    number in a device. With `interpret` plain JAX operations run, on any platform.
    """
    return _project_forward(x, norm, kernel, eps, cores, interpret)[0]


def _project_forward(
    x: Array, norm: Norm, kernel: Array, eps: float, cores: int, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def body(x: Any, scale: Any, offset: Any, kernel: Any, out: Any) -> None:
        y, _, _ = _normalised(x[...], scale, offset, eps)
        out[...] = dot(y, kernel[...], (1, 0)).astype(out.dtype)

    rows = jax.ShapeDtypeStruct((len(x), kernel.shape[1]), x.dtype)
    (out,) = _call(body, (x,), (*norm, kernel), (rows,), kernel.size, cores, interpret, "project")
    out = checkpoint_name(out, PROJECTED)
    return (out, x), (x, *norm, kernel)


def _project_backward(
    eps: float, cores: int, interpret: bool, inputs: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Norm, Array]:
    x, *weights = inputs

    def body(x: Any, g: Any, g_x: Any, scale: Any, offset: Any, kernel: Any, grad_x: Any, *grads: Any) -> None:
        clear(grads)
        grad_scale, grad_offset, grad_kernel = grads
        y, normalised, reciprocal = _normalised(x[...], scale, offset, eps)
        grad_kernel[...] += dot(y, g[...], (0, 0))
        grad_y = dot(g[...], kernel[...], (1, 1))
        grad = _norm_gradient(grad_y, normalised, reciprocal, scale, grad_scale, grad_offset)
        grad_x[...] = (g_x[...].astype(jnp.float32) + grad).astype(grad_x.dtype)

    products = 2 * weights[2].size
    grad_x, *grads = _call(body, (x, *g), weights, (x,), products, cores, interpret, "project_gradient", summed=weights)
    return grad_x, Norm(grads[0], grads[1]), grads[2]


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def finish(
    x: Array, attended: Array, weights: Weights, act: Activation, eps: float, cores: int, interpret: bool = False
) -> Array:
    """Compute the rest of a block after its attention: y = x + attended @ out, and y + down(act(up(norm(y)))).

    Rows before the block and `attended`, the concatenated heads, are (rows, d) in the dtype of the products. `act` is
    computed in fp32. For other arguments see `project`.
    """
    return _finish_forward(x, attended, weights, act, eps, cores, interpret)[0]


def _finish_forward(
    x: Array, attended: Array, weights: Weights, act: Activation, eps: float, cores: int, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    def body(x: Any, attended: Any, *rest: Any) -> None:
        *refs, out = rest
        w = Weights(*refs)
        total = x[...].astype(jnp.float32) + dot(attended[...], w.out[...], (1, 0)) + w.out_bias[...]
        y, _, _ = _normalised(total, w.scale, w.offset, eps, x.dtype)
        total += w.down_bias[...]
        for chunk in _chunks(w.up.shape[1]):
            hidden = act(dot(y, w.up[:, chunk], (1, 0)) + w.up_bias[:, chunk])
            total += dot(hidden.astype(x.dtype), w.down[chunk, :], (1, 0))
        out[...] = total.astype(out.dtype)

    products = weights.out.size + 2 * weights.up.size
    (out,) = _call(body, (x, attended), weights, (x,), products, cores, interpret, "finish")
    return out, (x, attended, *weights)


def _finish_backward(
    act: Activation, eps: float, cores: int, interpret: bool, inputs: tuple[Array, ...], g: Array
) -> tuple[Array, Array, Weights]:
    x, attended, *weights = inputs

    def body(x: Any, attended: Any, g: Any, *rest: Any) -> None:
        w = Weights(*rest[:8])
        grad_x, grad_attended, *refs = rest[8:]
        clear(refs)
        grads = Weights(*refs)
        before = x[...].astype(jnp.float32) + dot(attended[...], w.out[...], (1, 0)) + w.out_bias[...]
        y, normalised, reciprocal = _normalised(before, w.scale, w.offset, eps, x.dtype)
        g_out = g[...]
        grad_y = jnp.zeros(y.shape, jnp.float32)
        for chunk in _chunks(w.up.shape[1]):
            units = dot(y, w.up[:, chunk], (1, 0)) + w.up_bias[:, chunk]
            hidden, slope = jax.jvp(act, (units,), (jnp.ones_like(units),))
            grad = dot(g_out, w.down[chunk, :], (1, 1)) * slope
            rounded = grad.astype(x.dtype)
            grads.down[chunk, :] += dot(hidden.astype(x.dtype), g_out, (0, 0))
            grads.up[:, chunk] += dot(y, rounded, (0, 0))
            grads.up_bias[:, chunk] += jnp.sum(grad, axis=0, keepdims=True)
            grad_y += dot(rounded, w.up[:, chunk], (1, 1))
        g_out = g_out.astype(jnp.float32)
        grads.down_bias[...] += jnp.sum(g_out, axis=0, keepdims=True)
        total = g_out + _norm_gradient(grad_y, normalised, reciprocal, w.scale, grads.scale, grads.offset)
        grads.out_bias[...] += jnp.sum(total, axis=0, keepdims=True)
        total = total.astype(x.dtype)
        grad_x[...] = total
        grad_attended[...] = dot(total, w.out[...], (1, 1)).astype(x.dtype)
        grads.out[...] += dot(attended[...], total, (0, 0))

    products = 3 * weights[0].size + 5 * weights[4].size
    grad_x, grad_attended, *grads = _call(
        body, (x, attended, g), weights, (x, x), products, cores, interpret, "finish_gradient", summed=weights
    )
    return grad_x, grad_attended, Weights(*grads)


finish.defvjp(_finish_forward, _finish_backward)


def _call(
    body: Callable[..., None],
    rows: Sequence[Array],
    weights: Sequence[Array],
    results: Sequence[Any],
    products: int,
    cores: int,
    interpret: bool,
    name: str,
    *,
    summed: Sequence[Array] = (),
) -> list[Array]:
    """Call the kernel `body` on blocks of rows.

    Args:
      body: function of references to blocks of `rows`, to `weights`, and to blocks of results and sums.
      rows: arrays split over the blocks, (rows, channels).
      weights: arrays that every block reads, with two dimensions.
      results: shapes of results with one row per row.
      products: multiplications per row.
      cores, interpret: see `project`.
      name: name of the kernel.
      summed: weights whose gradients are further results, to which each block adds.
    """
    size = math.gcd(len(rows[0]) // cores, ROWS)
    blocks = len(rows[0]) // cores // size
    by_row = [pl.BlockSpec((size, x.shape[1]), lambda core, i: (core * blocks + i, 0)) for x in (*rows, *results)]
    single = pl.Buffered(1)  # the array is the same for all blocks
    shared = [pl.BlockSpec(w.shape, lambda core, i: (0, 0), pipeline_mode=single) for w in weights]
    sums = [pl.BlockSpec((None, *w.shape), lambda core, i: (core, 0, 0), pipeline_mode=single) for w in summed]
    shapes = [jax.ShapeDtypeStruct((cores, *w.shape), jnp.float32) for w in summed]
    arrays = (*rows, *weights, *results, *shapes)
    outputs = pl.pallas_call(
        body,
        grid=(cores, blocks),
        in_specs=[*by_row[: len(rows)], *shared],
        out_specs=[*by_row[len(rows) :], *sums],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results), *shapes],
        # The blocks of a core run in order, so that they can add to the same sums.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=max(MEMORY.values())
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(rows[0]) * products,
            transcendentals=0,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpret,
        name=name,
    )(*rows, *weights)
    gradients = zip(outputs[len(results) :], summed, strict=True)
    return [*outputs[: len(results)], *(grad.sum(0).astype(w.dtype) for grad, w in gradients)]


def _normalised(x: Array, scale: Any, offset: Any, eps: float, dtype: Any = None) -> tuple[Array, Array, Array]:
    """Return the norm's output in `dtype` or the input's, and in fp32 the input normalised, and 1 / std."""
    dtype = dtype or x.dtype
    x = x.astype(jnp.float32)
    x -= jnp.mean(x, axis=1, keepdims=True)
    reciprocal = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
    x *= reciprocal
    return (x * scale[...] + offset[...]).astype(dtype), x, reciprocal


def _norm_gradient(
    g: Array, normalised: Array, reciprocal: Array, scale: Any, grad_scale: Any, grad_offset: Any
) -> Array:
    """Add the gradients of a LayerNorm's parameters to their sums, and return its input's gradient; all in fp32."""
    grad_scale[...] += jnp.sum(g * normalised, axis=0, keepdims=True)
    grad_offset[...] += jnp.sum(g, axis=0, keepdims=True)
    g *= scale[...]
    along = jnp.mean(g * normalised, axis=1, keepdims=True)
    return reciprocal * (g - jnp.mean(g, axis=1, keepdims=True) - normalised * along)


def _chunks(hidden: int) -> list[slice]:
    size = max(n for n in range(LANES, CHUNK + 1, LANES) if hidden % n == 0)
    return [slice(start, start + size) for start in range(0, hidden, size)]
