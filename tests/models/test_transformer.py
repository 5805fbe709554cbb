import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.helpers.util import jit, random_variables, two_towers
from xclip_jax.models.transformer import (
    Block,
    TextTowerConfig,
    TextTransformer,
    Transformer,
    TransformerConfig,
    stack_blocks,
    unstack_blocks,
)
from xclip_jax.models.vit import ImageTowerConfig, VisionTransformer
from xclip_jax.parallel.sharding import RULES

EOT = 40
SHAPE = {"width": 24, "depth": 2, "heads": 3}
IMG = VisionTransformer(ImageTowerConfig(image_size=16, patch=4, scan=False, **SHAPE))
TXT = TextTransformer(TextTowerConfig(context_length=7, scan=False, **SHAPE), vocab=50, eot_id=EOT)
# Some ids are above the end's, as in vocabularies other than CLIP's.
TEXT = np.array([[45, 3, 7, EOT, 0, 0, 0], [45, 9, EOT, 0, 0, 0, 0], [38, 5, 1, 8, 49, 6, EOT]])
IMAGE = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def changed(tower, **keys):
    return tower.clone(config=dataclasses.replace(tower.config, **keys))


def value_and_grad(tower, params, batch):
    """h and the gradients of a weighted sum of it."""

    def loss(params):
        h = tower.apply({"params": params}, batch)
        weights = jnp.cos(jnp.arange(h.size)).reshape(h.shape)
        return jnp.sum(weights * h), h

    return jit(jax.grad(loss, has_aux=True))(params)[::-1]


@functools.cache
def reference(kind):
    tower, batch = {"img": (IMG, IMAGE), "txt": (TXT, TEXT)}[kind]
    params = random_variables(tower, batch)["params"]
    return params, *value_and_grad(tower, params, batch)


def in_layout(params, scan):
    return params | {"transformer": stack_blocks(params["transformer"], 2)} if scan else params


@pytest.mark.parametrize(
    ("tower", "scan", "remat"),
    [(IMG, True, "dots"), (IMG, False, "full"), (TXT, True, "none"), (TXT, False, "dots"), (TXT, True, "full")],
)
def test_scan_and_remat_change_nothing(tower, scan, remat):
    batch = IMAGE if tower is IMG else TEXT
    params, h_expected, grads_expected = reference("img" if tower is IMG else "txt")
    h, grads = value_and_grad(changed(tower, scan=scan, remat=remat), in_layout(params, scan), batch)
    np.testing.assert_allclose(h, h_expected, atol=1e-5)
    if scan:
        grads = grads | {"transformer": unstack_blocks(grads["transformer"], 2)}
    chex.assert_trees_all_close(grads, grads_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_recomputes_what_it_says(scan):
    params = in_layout(reference("img")[0], scan)

    def products(remat):
        tower = changed(IMG, scan=scan, remat=remat)
        gradient = jit(jax.grad(lambda params: tower.apply({"params": params}, IMAGE).sum()))
        return gradient.lower(params).as_text().count("stablehlo.dot_general")

    # "dots" recomputes the attention's two batched products, "full" the others of a block as well.
    assert products("none") < products("dots") < products("full")


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
    "bias": True,
    "cluster_head": {"clusters": 12, "hidden": 20},
}


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


@pytest.mark.parametrize(("scan", "pool"), [(False, "cls"), (True, "map")])
def test_every_parameter_names_its_axes(scan, pool):
    model = two_towers(
        **SIZES | {"img": SIZES["img"] | {"scan": scan, "pool": pool}, "txt": SIZES["txt"] | {"scan": scan}}
    )
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGE, TEXT)["params"]
    specs, shapes = nn.get_partition_spec(params), nn.unbox(params)
    plain = {"batch", "kv", "layers", "norm", "patch", "table", "vocab"}
    known = {None, *plain, *RULES["fsdp_tp"]}

    def check(path, spec, x):
        key = jax.tree_util.keystr(path)
        assert len(spec) == x.ndim and set(spec) <= known, f"{key}: {spec} names {x.shape}"
        assert ("layers" in spec) == ("'blocks'" in key), f"{key}: {spec}"
        assert "layers" not in spec[1:], f"{key}: {spec}"

    jax.tree_util.tree_map_with_path(check, specs, shapes)
    blocks = specs["img"]["transformer"]["blocks" if scan else "block_0"]
    assert tuple(blocks["attention"]["qkv"]["kernel"])[int(scan) :] == ("embed", None, "heads", "kv")
    assert tuple(blocks["attention"]["qkv"]["bias"])[int(scan) :] == (None, "heads", "kv")
    assert tuple(blocks["mlp"]["down"]["kernel"])[int(scan) :] == ("mlp", "embed")


def test_text_feature_ignores_what_follows_its_end():
    apply = functools.partial(jit(TXT.apply), random_variables(TXT, TEXT))
    h = apply(TEXT)
    chex.assert_shape(h, (3, 24))
    padded = TEXT.copy()
    padded[0, 4:], padded[1, 3:] = [11, EOT, 12], [7, 7, EOT, 1]  # an end after the first end is padding too
    np.testing.assert_allclose(apply(padded), h, atol=1e-6)
    np.testing.assert_allclose(apply(TEXT[:2, :5]), h[:2], atol=1e-5)


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


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path_leaves_out_branches_and_counts_the_rest_for_more(scan):
    config = TransformerConfig(width=8, depth=3, heads=2, scan=scan)
    unrolled = Transformer(config.unrolled(), drop_path=0.4)
    rng = np.random.default_rng(0)
    x, noise = jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.float32), rng.random((4, 3, 2))
    noise[0], noise[1] = 0.0, 1.0  # all that may go, goes; nothing does
    variables = random_variables(unrolled, x)
    params = variables["params"]
    module = Transformer(config, drop_path=0.4)
    if scan:
        variables = {"params": stack_blocks(params, 3)}
    out = jit(module.apply)(variables, x, jnp.asarray(noise))
    expected = x
    for i, rate in enumerate((0.0, 0.2, 0.4)):
        keep = jnp.asarray((noise[:, i] >= rate) / (1 - rate), jnp.float32)
        block = Block(config, False, jnp.float32)
        expected, _ = jit(block.apply)({"params": params[f"block_{i}"]}, expected, keep)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    first, _ = jit(block.apply)({"params": params["block_0"]}, x)
    np.testing.assert_allclose(out[0], first[0], rtol=1e-4, atol=1e-5)
    plain = jit(module.apply)(variables, x)
    np.testing.assert_array_equal(plain, jit(Transformer(config).apply)(variables, x, jnp.asarray(noise)))
