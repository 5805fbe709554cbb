"""Cluster logits that are not multiplied out: what a head may hand to a loss that never holds them whole."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class FactoredLogits:
    """Cluster logits (b, k) not multiplied out, x @ kernel + bias, for a loss that never holds them whole.

    x (b, d) decides in which dtype they are computed; kernel (d, k) and bias (k,) are fp32.
    """

    x: jax.Array
    kernel: jax.Array
    bias: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(b, k)."""
        return self.x.shape[0], self.kernel.shape[1]

    def logits(self) -> jax.Array:
        """The logits in fp32."""
        dtype = self.x.dtype
        return (jnp.matmul(self.x, self.kernel.astype(dtype)) + self.bias.astype(dtype)).astype(jnp.float32)


Logits = jax.Array | FactoredLogits
