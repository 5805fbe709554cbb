"""Logits that are split over devices, or kept as factors for a loss that computes them in chunks."""

import flax.struct
import jax
import jax.numpy as jnp

from xclip_jax.parallel.sharding import constrain

Array = jax.Array


def argmax(logits: Array, axis: int) -> Array:
    """Index of the first largest value along `axis`, as `jnp.argmax`, by two reductions; its size if a value is NaN.

    Over an axis that is split over devices, `jnp.argmax` sends pairs of value and index from each device to all others.
    """
    logits = jax.lax.stop_gradient(logits)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    largest = logits == jnp.max(logits, axis=axis, keepdims=True)
    return jnp.min(jnp.where(largest, index, logits.shape[axis]), axis=axis)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x @ kernel of factors in lower precision, summed and left in fp32; gradients are computed in their precision.

    By default the gradient would multiply fp32 by bf16, and devices would sum the kernel's gradient in fp32, at twice
    the traffic.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, *factors)[1](gradient.astype(factors[0].dtype))


_product.defvjp(_product_forward, _product_backward)


@flax.struct.dataclass
class FactoredLogits:
    """Factors of cluster logits (b, k) = x @ kernel + bias, for a loss that computes them in chunks.

    The product has the dtype of x (b, d); kernel (d, k) and bias (k,) are fp32.
    """

    x: Array
    kernel: Array
    bias: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(b, k)."""
        return self.x.shape[0], self.kernel.shape[1]

    def logits(self) -> Array:
        """Compute the logits in fp32; products of bf16 factors are summed in fp32 too, and so is the bias.

        If clusters are split over all devices, devices gather the rows of x first.
        """
        x = constrain(self.x, "row", None)
        product = jnp.matmul if x.dtype == jnp.float32 else _product
        return constrain(product(x, self.kernel.astype(x.dtype)), "row", "cluster") + self.bias


Logits = Array | FactoredLogits
