import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.util import jit
from xclip_jax.parallel.sharding import FactoredLogits


def test_cluster_logits_of_bfloat16_are_fp32():
    """Sums and bias are not rounded to the 8 bits of their factors, nor is the gradient of the bias."""
    rng = np.random.default_rng(0)  # around 3, so that sums are large
    x, kernel, bias, weights = (rng.normal(size=size, loc=3) for size in ((32, 48), (48, 20), (20,), (32, 20)))
    x, kernel, bias, weights = jnp.bfloat16(x), *map(jnp.float32, (kernel / 7, bias, weights))

    def loss(x, kernel, bias):
        s = FactoredLogits(x, kernel, bias).logits()
        return jnp.sum(weights * s), s

    grads, s = jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, kernel, bias)
    x, bias, weights = (np.asarray(y, np.float64) for y in (x, bias, weights))
    kernel = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, x @ kernel + bias, rtol=1e-5)
    assert [y.dtype for y in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    # The two products of gradients are in bf16, as those of all other layers.
    expected = weights @ kernel.T, x.T @ weights
    for found, exact in zip(grads[:2], expected, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-7)
    np.testing.assert_allclose(grads[2], weights.sum(axis=0), rtol=1e-5)
