"""The image tower: pools, stems, patches and attention."""

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
from xclip_jax.models.layers import LayerNorm, Style
from xclip_jax.models.transformer import TransformerConfig
from xclip_jax.models.vit import POOLS, AttentionPool, HierarchicalStem, VisionTransformer


@pytest.mark.parametrize(
    ("pool", "tokens", "stem"),
    [("cls", 17, "linear"), ("mean", 16, "linear"), ("map", 16, "linear"), ("cls", 17, "hmlp")],
)
def test_pools_and_stems(pool, tokens, stem):
    tower = changed(IMG, depth=1, pool=pool, stem=stem)
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


@pytest.mark.parametrize(("patch", "kernels"), [(12, (4, 3)), (16, (4, 2, 2)), (4, (4,))])
def test_hierarchical_stem_is_torchs_convolutions(patch, kernels):
    image = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    stem = HierarchicalStem(patch, 24, Style(), jnp.float32)
    variables = random_variables(stem, image)
    x = torch.tensor(image).permute(0, 3, 1, 2)
    for i, kernel in enumerate(kernels):
        part = variables["params"]
        if i:
            w = {name: torch.tensor(value) for name, value in part[f"norm_{i}"]["norm"].items()}
            x = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w["scale"], w["bias"])
            x = torch.nn.functional.gelu(x).permute(0, 3, 1, 2)
        w = np.asarray(part[f"linear_{i}"]["kernel"]).reshape(kernel, kernel, x.shape[1], -1)
        x = torch.nn.functional.conv2d(x, torch.tensor(w).permute(3, 2, 0, 1), stride=kernel)
    assert len(variables["params"]) == 2 * len(kernels) - 1
    np.testing.assert_allclose(stem.apply(variables, image), numpy(x.permute(0, 2, 3, 1)), rtol=1e-4, atol=1e-5)


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


def tokens_before_blocks(tower, variables, noise=None):
    """What the first block reads, (b, n, d)."""

    @jit
    def run(variables):
        capture = lambda module, _: module.name == "norm_pre"  # noqa: E731
        _, state = tower.apply(variables, IMAGE, noise, capture_intermediates=capture, mutable=["intermediates"])
        return state["intermediates"]["norm_pre"]["__call__"][0]

    return np.asarray(run(variables))


@pytest.mark.parametrize(
    ("pool", "share", "kept"), [("cls", 0.5, 8), ("cls", 0.3, 11), ("mean", 0.5, 8), ("map", 0.99, 1)]
)
def test_patch_dropout_keeps_a_random_subset(pool, share, kept):
    tower = changed(IMG, depth=1, pool=pool, patch_dropout=share)
    variables = random_variables(tower, IMAGE)
    every = tokens_before_blocks(tower, variables)
    noise = jax.random.uniform(jax.random.key(0), (3, 16))
    np.testing.assert_array_equal(every, tokens_before_blocks(changed(tower, patch_dropout=0.0), variables, noise))

    some = tokens_before_blocks(tower, variables, noise)
    first = int(pool == "cls")
    chex.assert_shape(some, (3, first + kept, 24))
    np.testing.assert_allclose(some[:, :first], every[:, :first], atol=1e-6)
    # Each kept token is one of its own image's, position included, and none comes twice.
    distance = np.abs(some[:, first:, None] - every[:, None, first:]).max(axis=-1)  # (b, kept, patches)
    assert distance.min(axis=2).max() < 1e-5
    chosen = [set(row) for row in distance.argmin(axis=2).tolist()]
    assert all(len(row) == kept for row in chosen)
    if kept > 1:
        assert chosen[0] != chosen[1]

    # Those with the smallest values stay, whatever the rest of the batch.
    expected = [set(row[:kept]) for row in np.argsort(noise, axis=1).tolist()]
    assert chosen == expected


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
