"""Both towers: switches that must not change the result, pools and patches, bad input."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from timm.layers import AttentionPoolLatent

from tests.helpers.util import jit, random_variables, two_towers
from xclip_jax.models.layers import (
    REMAT_POLICIES,
    LayerNorm,
    TransformerConfig,
    stack_blocks,
    unstack_blocks,
)
from xclip_jax.models.text import TextTowerConfig, TextTransformer
from xclip_jax.models.vit import POOLS, AttentionPool, HierarchicalStem, ImageTowerConfig, VisionTransformer
from xclip_jax.parallel.sharding import NAMES

EOT = 40
SHAPE = {"width": 24, "depth": 2, "heads": 3}
IMG = VisionTransformer(ImageTowerConfig(image_size=16, patch=4, scan=False, **SHAPE))
TXT = TextTransformer(TextTowerConfig(context_length=7, scan=False, **SHAPE), vocab=50, eot_id=EOT)
# Some ids are above the end's, as in vocabularies other than CLIP's.
TEXT = np.array([[45, 3, 7, EOT, 0, 0, 0], [45, 9, EOT, 0, 0, 0, 0], [38, 5, 1, 8, 49, 6, EOT]])
IMAGE = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)

both_towers = pytest.mark.parametrize(("tower", "batch"), [(IMG, IMAGE), (TXT, TEXT)], ids=["img", "txt"])


def changed(tower, **keys):
    return tower.clone(config=dataclasses.replace(tower.config, **keys))


def numpy(tensor):
    return tensor.detach().numpy()


# --- scan, remat, dtype, logical axes


def value_and_grad(tower, params, batch):
    """h and the gradients of a weighted sum of it."""

    def loss(params):
        h = tower.apply({"params": params}, batch)
        weights = jnp.cos(jnp.arange(h.size)).reshape(h.shape)
        return jnp.sum(weights * h), h

    return jit(jax.grad(loss, has_aux=True))(params)[::-1]


@functools.cache
def reference(kind):
    """Parameters, h and gradients of the unrolled tower without remat."""
    tower, batch = {"img": (IMG, IMAGE), "txt": (TXT, TEXT)}[kind]
    params = random_variables(tower, batch)["params"]
    return params, *value_and_grad(tower, params, batch)


def in_layout(params, scan):
    return params | {"transformer": stack_blocks(params["transformer"], 2)} if scan else params


@pytest.mark.parametrize(
    ("scan", "remat"), [(scan, remat) for scan in (False, True) for remat in REMAT_POLICIES if scan or remat != "none"]
)
@both_towers
def test_scan_and_remat_change_nothing(tower, batch, scan, remat):
    params, h_expected, grads_expected = reference("img" if tower is IMG else "txt")
    h, grads = value_and_grad(changed(tower, scan=scan, remat=remat), in_layout(params, scan), batch)
    np.testing.assert_allclose(h, h_expected, atol=1e-5)
    if scan:
        grads = grads | {"transformer": unstack_blocks(grads["transformer"], 2)}
    chex.assert_trees_all_close(grads, grads_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_remat_recomputes_what_it_says(scan):
    params = in_layout(reference("img")[0], scan)

    def products(remat):
        tower = changed(IMG, scan=scan, remat=remat)
        gradient = jit(jax.grad(lambda params: tower.apply({"params": params}, IMAGE).sum()))
        return gradient.lower(params).as_text().count("stablehlo.dot_general")

    # "dots" recomputes the attention's two batched products, "full" the others of a block as well.
    assert products("none") < products("dots") < products("full")


def test_stacked_blocks_round_trip():
    params = reference("txt")[0]["transformer"]
    stacked = stack_blocks(params, 2)
    chex.assert_shape(stacked["blocks"]["attention"]["qkv"]["kernel"], (2, 24, 3, 3, 8))
    chex.assert_trees_all_equal(unstack_blocks(stacked, 2), params)


def test_blocks_start_as_clips_and_different_from_one_another():
    @jit
    def kernels():
        params = nn.unbox(changed(TXT, scan=True).init(jax.random.key(0), TEXT))["params"]
        block = params["transformer"]["blocks"]
        names = [("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down")]
        return {name: block[part][name]["kernel"].reshape(2, -1) for part, name in names}

    residual = 24**-0.5 * (2 * 2) ** -0.5
    for name, std in {"qkv": 24**-0.5, "out": residual, "up": 48**-0.5, "down": residual}.items():
        kernel = np.asarray(kernels()[name])
        np.testing.assert_allclose(kernel.std(axis=1), std, rtol=0.1, err_msg=name)
        assert np.abs(kernel[0] - kernel[1]).max() > std, name


SIZES = {
    "img": {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 3, "pool": "map"},
    "txt": {"vocab": 50, "eot_id": EOT, "context_length": 7, "width": 24, "depth": 2, "heads": 3},
    "embed": 16,
    "bias_init": -10.0,
    "cluster_head": {"clusters": 12, "hidden": 20},
}
TOWERS = two_towers(**SIZES)


def test_bfloat16_keeps_parameters_and_outputs_in_fp32():
    shallow = SIZES | {"img": SIZES["img"] | {"depth": 1}, "txt": SIZES["txt"] | {"depth": 1}}
    full, half = two_towers(**shallow), two_towers(**shallow, dtype=jnp.bfloat16)
    shapes = nn.unbox(jax.eval_shape(half.init, jax.random.key(0), IMAGE, TEXT))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    variables = random_variables(full, IMAGE, TEXT)
    expected, out = (jit(model.apply)(variables, IMAGE, TEXT) for model in (full, half))
    for name, x in out.items():
        assert x.dtype == (jnp.bfloat16 if name.startswith("h_") else jnp.float32), name
        error = np.linalg.norm(x - expected[name]) / np.linalg.norm(expected[name])
        assert error < 0.03, f"{name}: {error}"
        # Without this a tower that ignored `dtype` would pass.
        assert error > 1e-4 or x.ndim == 0, f"{name}: {error}"


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_every_parameter_names_its_axes(scan, pool):
    model = two_towers(
        **SIZES | {"img": SIZES["img"] | {"scan": scan, "pool": pool}, "txt": SIZES["txt"] | {"scan": scan}}
    )
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)["params"]
    boxed = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(x, nn.LogicallyPartitioned) for x in boxed)
    specs, shapes = nn.get_partition_spec(params), nn.unbox(params)
    known = {None, *NAMES}

    def check(path, spec, x):
        key = jax.tree_util.keystr(path)
        assert len(spec) == x.ndim and set(spec) <= known, f"{key}: {spec} names {x.shape}"
        assert ("layers" in spec) == ("'blocks'" in key), f"{key}: {spec}"
        assert "layers" not in spec[1:], f"{key}: {spec}"

    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    jax.tree_util.tree_map_with_path(check, specs, shapes, is_leaf=is_spec)
    blocks = specs["img"]["transformer"]["blocks" if scan else "block_0"]
    assert tuple(blocks["attention"]["qkv"]["kernel"])[int(scan) :] == ("embed", None, "heads", "kv")
    assert tuple(blocks["attention"]["qkv"]["bias"])[int(scan) :] == (None, "heads", "kv")
    assert tuple(blocks["mlp"]["down"]["kernel"])[int(scan) :] == ("mlp", "embed")


# --- pools and patches


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
        norm = LayerNorm(config.eps).bind({"params": params["norm_post"]})
        np.testing.assert_allclose(norm(last[:, 1:]), tokens, atol=1e-5)
        np.testing.assert_allclose(norm(last[:, 0]), features, atol=1e-5)


@pytest.mark.parametrize(("patch", "kernels"), [(12, (4, 3)), (16, (4, 2, 2)), (4, (4,))])
def test_hierarchical_stem_is_torchs_convolutions(patch, kernels):
    image = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    stem = HierarchicalStem(patch, 24, "gelu", 1e-5, jnp.float32)
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


@functools.cache
def text_apply():
    variables = random_variables(TXT, TEXT)
    return functools.partial(jit(TXT.apply), variables)


def test_text_feature_ignores_what_follows_its_end():
    h = text_apply()(TEXT)
    chex.assert_shape(h, (3, 24))
    padded = TEXT.copy()
    padded[0, 4:], padded[1, 3:] = [11, EOT, 12], [7, 7, EOT, 1]  # an end after the first end is padding too
    np.testing.assert_allclose(text_apply()(padded), h, atol=1e-6)
    np.testing.assert_allclose(text_apply()(TEXT[:2, :5]), h[:2], atol=1e-5)


@pytest.mark.parametrize(("row", "position"), [(0, 0), (0, 2), (1, 1), (2, 5)])
def test_text_feature_sees_what_precedes_its_end(row, position):
    changed = TEXT.copy()
    changed[row, position] = 20
    moved = np.abs(text_apply()(changed) - text_apply()(TEXT)).max(axis=1)
    assert moved[row] > 1e-2
    assert np.delete(moved, row).max() < 1e-6


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


# --- bad input


@pytest.mark.parametrize(
    ("tower", "batch", "message"),
    [
        (IMG, IMAGE[:, :12, :12], r"16 x 16 pixels, got shape \(3, 12, 12, 3\)"),
        (IMG, IMAGE[..., :1], r"\(3, 16, 16, 1\)"),
        (changed(TXT, context_length=6), TEXT, "at most 6 tokens, got 7"),
    ],
)
def test_bad_input_is_refused(tower, batch, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), batch)
