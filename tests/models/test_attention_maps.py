"""Attention maps of the image tower."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.helpers.util import two_towers
from xclip_jax.models.layers import stack_blocks
from xclip_jax.parallel.mesh import AXES, make_mesh
from xclip_jax.report import examples


def softmax(query, key):
    """Per head: (b, n, heads, kv), (b, m, heads, kv) -> (b, heads, n, m)."""
    return scipy.special.softmax(np.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5, axis=-1)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_attention_is_that_of_the_tower(pool):
    """Queries and keys as captured, applied to the values, give what the tower's own attention gives."""
    tower = {"width": 16, "depth": 2, "heads": 2}
    model = two_towers(
        img={"image_size": 8, "patch": 4, "pool": pool, **tower},
        txt={"vocab": 8, "eot_id": 7, "context_length": 4, **tower},
        embed=8,
    )
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = (images / 255 - 0.5).astype(np.float32) / 0.25
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), pixels, jnp.zeros((3, 4), jnp.int32)))
    run = jax.jit(
        lambda v: model.apply(v, pixels, method="encode_image", capture_intermediates=True, mutable=["intermediates"])[
            1
        ]
    )
    found = jax.device_get(run(variables))["intermediates"]["img"]
    rollout = np.eye(4 + (pool == "cls"))[None]
    for i in range(2):
        layer = found["transformer"][f"block_{i}"]["attention"]
        query, key, value = (x.swapaxes(1, 2) for x in layer["qkv"]["__call__"][0])
        weights = softmax(query, key)
        out = jax.device_get(variables["params"]["img"]["transformer"][f"block_{i}"]["attention"]["out"])
        y = np.einsum("bhnm,bmhd,hdo->bno", weights, value, out["kernel"]) + out["bias"]
        theirs = layer["__call__"][0]
        assert theirs.shape[1] == (1 if pool == "cls" and i == 1 else y.shape[1])  # no other token is read
        np.testing.assert_allclose(y[:, : theirs.shape[1]], theirs, atol=1e-5)
        rollout = (weights.mean(axis=1) + np.eye(rollout.shape[1])) / 2 @ rollout
    last = weights.mean(axis=1)
    if pool == "map":
        key = found["pool_map"]["kv"]["__call__"][0][0].swapaxes(1, 2)
        last = softmax(found["pool_map"]["query"]["__call__"][0], key)
        last = last.mean(axis=1)
        rollout = last @ rollout
    expected = [{"cls": x[:, 0, 1:], "mean": x.mean(axis=1), "map": x[:, 0]}[pool] for x in (last, rollout)]

    mesh = make_mesh(dict(zip(AXES, (-1, 1, 1), strict=True)))
    if pool == "map":  # stacked blocks are the same tower
        model = model.clone(img=dataclasses.replace(model.img, scan=True, remat="full"))
        blocks = stack_blocks(variables["params"]["img"]["transformer"], 2)
        img = {**variables["params"]["img"], "transformer": blocks}
        variables = {"params": {**variables["params"], "img": img}}
    maps = examples.attention(model, variables, list(images), statistics, mesh, n=2, seed=5)
    assert len(set(maps.indices)) == 2
    for mine, theirs in zip((maps.last, maps.rollout), expected, strict=True):
        theirs = theirs[maps.indices] / theirs[maps.indices].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mine, theirs.reshape(2, 2, 2), atol=1e-5)
