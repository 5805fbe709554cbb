"""Linear maps: parameters in fp32 with named axes, and products whose gradients suit the platform."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from xclip_jax.parallel.sharding import platform

Array = jax.Array
Initializer = Callable[..., Any]


def named(init: Initializer, *axes: str | None) -> Initializer:
    """`init` with logical axis names attached to the parameter that it makes."""
    return nn.with_logical_partitioning(init, axes)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """(rows, inputs), (inputs, outputs) -> (rows, outputs), with a gradient that transposes the narrower operand.

    The gradient of the kernel is x^T g. XLA's CPU backend copies the transposed left operand, of as many rows as the
    batch has tokens: a fifth of a step where the wide one goes left.
    """
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = operands
    # No transposed kernel: where it is sharded its parts would be gathered once more for it.
    of_x = jax.lax.dot_general(g, kernel, (((1,), (1,)), ((), ())))
    rows = (((0,), (0,)), ((), ()))
    if platform() == "tpu":
        # Held to its layout: XLA would take over the layout of an array of heads, and copy the transposed g for it.
        return of_x, with_layout_constraint(jax.lax.dot_general(x, g, rows), Layout(major_to_minor=(0, 1)))
    narrow = x.shape[1] <= g.shape[1]
    return of_x, jax.lax.dot_general(x, g, rows) if narrow else jax.lax.dot_general(g, x, rows).T


matmul.defvjp(_matmul_forward, _matmul_backward)


def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    """`matmul` as `nn.DenseGeneral` asks for it: the last axes of x with the first ones of the kernel."""
    (contracted, _), _ = dimensions
    n = len(contracted)
    rows, outputs = x.shape[: x.ndim - n], kernel.shape[n:]
    inputs = math.prod(kernel.shape[:n])
    return matmul(x.reshape(-1, inputs), kernel.reshape(inputs, -1)).reshape(*rows, *outputs)


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    dtype: DTypeLike,
    axis: int | tuple[int, ...] = -1,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A linear map with a normal(0, std) kernel whose dimensions are named `axes`; parameters in fp32."""
    bias_axes = axes[len(axes) - (len(features) if isinstance(features, tuple) else 1) :]
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.normal(std), *axes),
        bias_init=named(nn.initializers.zeros, *bias_axes),
        dot_general=dot_general,
        name=name,
    )
