"""Logits that are split over devices, or not multiplied out for a loss that never holds them whole."""

import flax.struct
import jax
import jax.numpy as jnp

from xclip_jax.parallel.sharding import constrain

Array = jax.Array


def argmax(logits: Array, axis: int) -> Array:
    """Index of the first largest value along `axis`, as `jnp.argmax`, by two reductions; where one is NaN, the size.

    Over an axis that is split over devices, `jnp.argmax` sends the pairs of value and index of each to all others.
    """
    logits = jax.lax.stop_gradient(logits)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    largest = logits == jnp.max(logits, axis=axis, keepdims=True)
    return jnp.min(jnp.where(largest, index, logits.shape[axis]), axis=axis)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x @ kernel of factors in lower precision, summed and left in fp32; gradients are computed in their precision.

    Without a rule of its own the gradient would multiply fp32 by bf16, and devices would sum that of the kernel in
    fp32, at twice the traffic.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, *factors)[1](gradient.astype(factors[0].dtype))


_product.defvjp(_product_forward, _product_backward)


@flax.struct.dataclass
class FactoredLogits:
    """Cluster logits (b, k) not multiplied out, x @ kernel + bias, for a loss that never holds them whole.

    x (b, d) decides in which dtype the factors are multiplied; kernel (d, k) and bias (k,) are fp32.
    """

    x: Array
    kernel: Array
    bias: Array

    @property
    def shape(self) -> tuple[int, int]:
        """(b, k)."""
        return self.x.shape[0], self.kernel.shape[1]

    def logits(self) -> Array:
        """The logits in fp32; of bf16 factors too, products are summed and the bias is added in fp32.

        Where clusters are split over all devices, these gather the rows of x first.
        """
        x = constrain(self.x, "row", None)
        product = jnp.matmul if x.dtype == jnp.float32 else _product
        return constrain(product(x, self.kernel.astype(x.dtype)), "row", "cluster") + self.bias


Logits = Array | FactoredLogits
