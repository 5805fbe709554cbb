"""Parts of towers: activations, norms and attention against torch's, and branches that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import scipy.special
import torch

from tests.helpers.util import random_variables
from tests.models.test_transformer import IMG, TXT, numpy
from xclip_jax.models.layers import ACTIVATIONS, LayerNorm, attend, gelu


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gelu", torch.nn.GELU()),
        ("gelu_tanh", torch.nn.GELU(approximate="tanh")),
        ("quick_gelu", open_clip.transformer.QuickGELU()),
    ],
)
def test_activations(name, theirs):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), numpy(theirs(torch.tensor(x))), atol=2e-6)


@pytest.mark.parametrize("fields", [{}, {"eps": 1e-6}])
def test_layer_norm_is_torchs(fields):
    # Deviations of the order of sqrt(eps), where eps decides.
    x = 3e-3 * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    norm = LayerNorm(**fields)
    variables = random_variables(norm, x)
    weight, bias = (torch.tensor(np.asarray(variables["params"]["norm"][name])) for name in ("scale", "bias"))
    eps = fields.get("eps", 1e-5)  # CLIP's
    theirs = torch.nn.functional.layer_norm(torch.tensor(x), (8,), weight, bias, eps)
    np.testing.assert_allclose(norm.apply(variables, x), numpy(theirs), atol=1e-5)
    assert IMG.config.details.eps == TXT.config.details.eps == LayerNorm.eps == 1e-5


@pytest.mark.parametrize(("causal", "queries"), [(False, 1), (True, 6)])
def test_attend_is_torchs(causal, queries):
    rng = np.random.default_rng(0)
    query, key, value = (2 * rng.normal(size=(2, 3, n, 8)).astype(np.float32) for n in (queries, 6, 6))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        torch.tensor(query), torch.tensor(key), torch.tensor(value), is_causal=causal
    )
    np.testing.assert_allclose(attend(query, key, value, causal=causal), numpy(theirs), atol=2e-6)


def test_gelu_of_narrow_numbers_does_not_cancel():
    """1 + erf(x) of numbers of 8 bits loses what is left of it where x is negative."""
    x = jnp.linspace(-5, -1, 401, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact * scipy.special.ndtr(exact)
    assert np.abs(np.asarray(jax.jit(gelu)(x), np.float64) - exact).max() < 1e-3
