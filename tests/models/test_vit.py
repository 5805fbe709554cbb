import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.util import jit, random_variables
from tests.models.test_transformer import IMAGE, IMG, in_layout
from xclip_jax.models.vit import POOLS, AttentionPool, VisionTransformer


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
