"""Effective rank of features: in how many directions a batch varies, whatever the loss."""

import chex
import jax
import jax.numpy as jnp


def effective_rank(h: jax.Array) -> jax.Array:
    """Return the effective number of directions in which features vary: (tr C)^2 / tr(C^2), C their covariance.

    This is the participation ratio, the exponential of the Renyi-2 entropy of C's normalised spectrum, and a lower
    bound of Roy and Vetterli's effective rank (EUSIPCO 2007), which takes Shannon's entropy and so needs the spectrum
    itself. Here one matrix product suffices, of the smaller of the two Gram matrices.

    Args:
        h: features, shape (b, d), of the global batch; any float type.

    Returns:
        fp32 scalar between 1 and min(b - 1, d), without gradient; 0 if all features are equal up to rounding.

    Raises:
        AssertionError: if h is not of rank 2.
    """
    chex.assert_rank(h, 2)
    h = jax.lax.stop_gradient(h).astype(jnp.float32)
    centred = h - jnp.mean(h, axis=0)
    trace = jnp.sum(centred**2)
    # Equal features leave the mean's rounding error, a spurious rank of 1: relative 1e-6 at worst, squared.
    varies = trace > 1e-11 * jnp.sum(h**2)
    unit = centred / jnp.sqrt(jnp.where(varies, trace, 1.0))
    small = unit.T if h.shape[1] <= h.shape[0] else unit
    gram = jnp.matmul(small, small.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return jnp.where(varies, 1.0 / jnp.sum(jnp.where(varies, gram, 1.0) ** 2), 0.0)
