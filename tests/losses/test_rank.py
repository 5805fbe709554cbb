"""The effective rank of features against the spectrum of their covariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xclip_jax.losses.rank import effective_rank


@pytest.mark.parametrize(("b", "d"), [(40, 6), (6, 40), (12, 12)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_effective_rank_equals_spectrum(b, d, size):
    h = np.random.default_rng(0).normal(size=(b, d)) * np.linspace(0.1, 2, d) + 3
    spectrum = np.linalg.svd(h - h.mean(axis=0), compute_uv=False) ** 2
    expected = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert float(effective_rank(jnp.asarray(size * h, jnp.float32))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_counts_equal_directions(rank):
    h = np.concatenate([np.eye(8)[:rank], -np.eye(8)[:rank]]) + 5
    assert float(effective_rank(jnp.asarray(h, jnp.float32))) == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_effective_rank_of_equal_features_is_zero(value):
    row = value * np.random.default_rng(0).normal(size=16)
    h = jnp.asarray(np.tile(row, (1000, 1)), jnp.float32)
    assert float(effective_rank(h)) == 0
    assert not np.any(jax.grad(lambda x: effective_rank(x))(h))
