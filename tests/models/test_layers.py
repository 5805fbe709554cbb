import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from tests.helpers.util import random_variables
from tests.models.test_transformer import IMG, TXT
from xclip_jax.models.layers import LayerNorm, gelu


@pytest.mark.parametrize("fields", [{}, {"eps": 1e-6}])
def test_layer_norm_is_torchs(fields):
    # Deviations of the order of sqrt(eps), where eps decides.
    x = 3e-3 * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    norm = LayerNorm(**fields)
    variables = random_variables(norm, x)
    weight, bias = (torch.tensor(np.asarray(variables["params"]["norm"][name])) for name in ("scale", "bias"))
    eps = fields.get("eps", 1e-5)  # CLIP's
    theirs = torch.nn.functional.layer_norm(torch.tensor(x), (8,), weight, bias, eps)
    np.testing.assert_allclose(norm.apply(variables, x), theirs.numpy(), atol=1e-5)
    assert IMG.config.details.eps == TXT.config.details.eps == LayerNorm.eps == 1e-5


def test_gelu_of_narrow_numbers_does_not_cancel():
    """1 + erf(x) of numbers of 8 bits loses what is left of it where x is negative."""
    x = jnp.linspace(-5, -1, 401, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact * scipy.special.ndtr(exact)
    assert np.abs(np.asarray(jax.jit(gelu)(x), np.float64) - exact).max() < 1e-3
