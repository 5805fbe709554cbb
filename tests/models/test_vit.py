"""The image tower: pools, patches and attention maps."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from timm.layers import AttentionPoolLatent

from tests.helpers.util import jit, random_variables, two_towers
from tests.models.test_transformer import IMAGE, IMG, changed, in_layout, numpy
from xclip_jax.models.layers import LayerNorm
from xclip_jax.models.transformer import TransformerConfig, stack_blocks
from xclip_jax.models.vit import POOLS, AttentionPool, VisionTransformer
from xclip_jax.parallel.mesh import AXES, make_mesh
from xclip_jax.report import examples


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
    """Unrolled and stacked blocks give the same; their mean is that of "mean", and "map" attends to them."""
    config = dataclasses.replace(IMG.config, pool=pool)
    params = random_variables(VisionTransformer(config), IMAGE)["params"]
    h = jit(lambda params: config.patch_features(params, IMAGE, jnp.float32))(params)
    chex.assert_shape(h, (3, config.grid, config.grid, 24))
    scanned = dataclasses.replace(config, scan=True)
    stacked = in_layout(params, scan=True)
    np.testing.assert_allclose(scanned.patch_features(stacked, IMAGE, jnp.float32), h, atol=1e-5)
    features, tokens = VisionTransformer(config).apply({"params": params}, IMAGE), h.reshape(3, -1, 24)
    if pool == "mean":
        np.testing.assert_allclose(tokens.mean(axis=1), features, atol=1e-5)
    if pool == "map":
        pooled = AttentionPool(config).apply({"params": params["pool_map"]}, tokens)
        np.testing.assert_allclose(pooled, features, atol=1e-5)
    if pool == "cls":  # stacked blocks compute every token, of which the tower returns the first
        tower = VisionTransformer(scanned)
        _, captured = tower.apply({"params": stacked}, IMAGE, capture_intermediates=True, mutable=["intermediates"])
        last = captured["intermediates"]["transformer"]["__call__"][0]
        norm = LayerNorm(config.details.eps).bind({"params": params["norm_post"]})
        np.testing.assert_allclose(norm(last[:, 1:]), tokens, atol=1e-5)
        np.testing.assert_allclose(norm(last[:, 0]), features, atol=1e-5)


def test_map_pool_is_timms():
    torch.manual_seed(0)
    theirs = AttentionPoolLatent(24, num_heads=3, mlp_ratio=2.0, norm_layer=torch.nn.LayerNorm)
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
    w = {name: numpy(p) for name, p in theirs.named_parameters()}
    params = {
        "probe": w["latent"],
        "query": {"kernel": w["q.weight"].T.reshape(24, 3, 8), "bias": w["q.bias"].reshape(3, 8)},
        "kv": {"kernel": w["kv.weight"].T.reshape(24, 2, 3, 8), "bias": w["kv.bias"].reshape(2, 3, 8)},
        "out": {"kernel": w["proj.weight"].T.reshape(3, 8, 24), "bias": w["proj.bias"]},
        "norm": {"norm": {"scale": w["norm.weight"], "bias": w["norm.bias"]}},
        "mlp": {
            "up": {"kernel": w["mlp.fc1.weight"].T, "bias": w["mlp.fc1.bias"]},
            "down": {"kernel": w["mlp.fc2.weight"].T, "bias": w["mlp.fc2.bias"]},
        },
    }
    x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    ours = AttentionPool(TransformerConfig(24, heads=3, mlp_ratio=2.0)).apply({"params": params}, x)
    np.testing.assert_allclose(ours, numpy(theirs(torch.tensor(x))), atol=1e-5)


def softmax(query, key):
    """Per head: (b, n, heads, kv), (b, m, heads, kv) -> (b, heads, n, m)."""
    return scipy.special.softmax(np.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5, axis=-1)


@pytest.mark.parametrize("pool", POOLS)
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
    for i in range(2):
        layer = found["transformer"][f"block_{i}"]["attention"]
        query, key, value = (x.swapaxes(1, 2) for x in layer["qkv"]["__call__"][0])
        weights = softmax(query, key)
        out = jax.device_get(variables["params"]["img"]["transformer"][f"block_{i}"]["attention"]["out"])
        y = np.einsum("bhnm,bmhd,hdo->bno", weights, value, out["kernel"]) + out["bias"]
        theirs = layer["__call__"][0]
        assert theirs.shape[1] == (1 if pool == "cls" and i == 1 else y.shape[1])  # no other token is read
        np.testing.assert_allclose(y[:, : theirs.shape[1]], theirs, atol=1e-5)
    last = weights.mean(axis=1)
    if pool == "map":
        key = found["pool_map"]["kv"]["__call__"][0][0].swapaxes(1, 2)
        last = softmax(found["pool_map"]["query"]["__call__"][0], key)
        last = last.mean(axis=1)
    expected = {"cls": last[:, 0, 1:], "mean": last.mean(axis=1), "map": last[:, 0]}[pool]

    mesh = make_mesh(dict(zip(AXES, (-1, 1, 1), strict=True)))
    if pool == "map":  # stacked blocks are the same tower
        model = model.clone(img=dataclasses.replace(model.img, scan=True, remat="full"))
        blocks = stack_blocks(variables["params"]["img"]["transformer"], 2)
        img = {**variables["params"]["img"], "transformer": blocks}
        variables = {"params": {**variables["params"], "img": img}}
    maps = examples.attention(model, variables, list(images), statistics, mesh, n=2, seed=5)
    assert len(set(maps.indices)) == 2
    theirs = expected[maps.indices] / expected[maps.indices].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(maps.last, theirs.reshape(2, 2, 2), atol=1e-5)
