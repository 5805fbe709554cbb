import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.util import jit, random_variables
from tests.models.test_transformer import IMAGE, IMG, changed, in_layout
from xclip_jax.models.vit import POOLS, AttentionPool, VisionTransformer


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 17), ("mean", 16), ("map", 16)])
def test_pools(pool, tokens):
    tower = changed(IMG, depth=1, pool=pool)
    variables = random_variables(tower, IMAGE)
    apply = jit(tower.apply)
    chex.assert_shape(variables["params"]["positions"], (tokens, 24))
    h = apply(variables, IMAGE)
    chex.assert_shape(h, (3, 24))

    order = np.random.default_rng(1).permutation(16)
    patches = IMAGE.reshape(3, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(3, 16, 4, 4, 3)
    shuffled = patches[:, order].reshape(3, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(IMAGE.shape)
    assert np.abs(apply(variables, shuffled) - h).max() > 1e-2
    # Only the positions tell patches apart.
    params = variables["params"]
    blind = {"params": params | {"positions": jnp.zeros_like(params["positions"])}}
    np.testing.assert_allclose(apply(blind, shuffled), apply(blind, IMAGE), atol=1e-5)
    assert np.abs(apply(blind, IMAGE[::-1]) - apply(blind, IMAGE)).max() > 1e-2


@pytest.mark.parametrize("pool", POOLS)
def test_patch_features_are_what_is_pooled(pool):
    """Stacked blocks give the same, and "map" attends to them; open_clip has those of the other pools."""
    config = dataclasses.replace(IMG.config, pool=pool)
    params = random_variables(VisionTransformer(config), IMAGE)["params"]
    h = jit(lambda params: config.patch_features(params, IMAGE, jnp.float32))(params)
    chex.assert_shape(h, (3, config.grid, config.grid, 24))
    stacked = dataclasses.replace(config, scan=True).patch_features(in_layout(params, scan=True), IMAGE, jnp.float32)
    np.testing.assert_allclose(stacked, h, atol=1e-5)
    if pool == "map":
        pooled = AttentionPool(config).apply({"params": params["pool_map"]}, h.reshape(3, -1, 24))
        np.testing.assert_allclose(pooled, VisionTransformer(config).apply({"params": params}, IMAGE), atol=1e-5)
