"""Adapters: against products in NumPy, and in a step, where they are all that changes in the towers."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax import optim
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.models import lora
from xclip_jax.train import build, state


def trained(steps=2, **changes):
    """(state before, state after some steps, experiment) of a tiny CLIP."""
    p = build.build(tiny.config("clip", init__weights="x", optim__weight_decay=0.5, **changes))
    s = state.create(p.init, p.abstract)
    before = jax.device_get(s)
    for i in range(steps):
        batch = loader.to_global(tiny.batch(b=p.config.data.batch, eot=p.tokenizer.eot_id, seed=i), p.mesh)
        s, metrics = p.compiled(s, batch)
        assert not metrics["skipped"]
    return before, jax.device_get(s), p


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_only_adapters_change_in_the_towers(scan):
    tower = {"model__img__scan": scan, "model__img__depth": 2, "finetune__lora__rank": 3}
    before, after, _ = trained(**tower)
    chex.assert_trees_all_equal(before.variables()["params"], lora.merged({**before.params, "lora": {}}))
    assert before.variables()["params"].keys() == before.params.keys() - {"lora"}
    for name in ("img", "txt"):
        chex.assert_trees_all_equal(after.params[name], before.params[name])
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(after.params["lora"]))
    moving = [after.params[name] for name in after.params if name not in ("img", "txt")]
    moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(moving) if x.ndim)


def test_merged_kernels_are_sums_of_products():
    _, after, _ = trained(model__img__scan=True, model__img__depth=2, finetune__lora__rank=3)
    merged = after.variables()["params"]["img"]["transformer"]["blocks"]
    given = after.params["img"]["transformer"]["blocks"]
    factors = after.params["lora"]["img"]["transformer"]["blocks"]
    for part, name in (("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down")):
        a, b = (np.float64(factors[part][name]["kernel"][x]) for x in ("inputs", "outputs"))
        kernel = given[part][name]["kernel"]
        expected = kernel + np.einsum("lir,lro->lio", a, b).reshape(kernel.shape)
        np.testing.assert_allclose(merged[part][name]["kernel"], expected, rtol=0, atol=1e-6)
    chex.assert_trees_all_equal(merged["norm_1"], given["norm_1"])


def test_a_tower_without_adapters_and_a_block_that_is_not_there_are_refused():
    params = {"img": {"convolutions": {"mlp": {"up": {"kernel": jnp.ones((8, 8))}}}}}
    with pytest.raises(UserError, match=r"no transformer in the tower 'img' has any of the kernels qkv, out, up"):
        lora.initial(params, lora.LoraConfig(rank=2), jax.random.key(0))


def test_an_adapter_larger_than_its_kernel_is_refused():
    """From the config, and by the shapes of a tower whose config does not say them; full rank is allowed."""
    keys = {"init__weights": "x", "finetune__lora__rank": 32}
    resolve(tiny.config("clip", **keys))
    keys["finetune__lora__rank"] = 33
    with pytest.raises(UserError, match=r"kernel img qkv, 32 x 96; lower it to 32 or less\."):
        resolve(tiny.config("clip", **keys))
    resolve(tiny.config("clip", **keys, model__img__width=64, model__txt__width=64))
    params = {"img": {"transformer": {"block_0": {"mlp": {"up": {"kernel": jnp.ones((8, 16))}}}}}}
    lora.initial(params, lora.LoraConfig(rank=8), jax.random.key(0))
    with pytest.raises(UserError, match=r"rank is 9, above the size of the kernel img/transformer/block_0/mlp/up, 8 x"):
        lora.initial(params, lora.LoraConfig(rank=9), jax.random.key(0))


def test_some_kernels_have_adapters():
    p = build.build(tiny.config("clip", init__weights="x", finetune__lora={"rank": 2, "targets": ("qkv",)}))
    assert p.num_parameters == build.build(tiny.config("clip")).num_parameters
    block = p.abstract.params["lora"]["txt"]["transformer"]["block_0"]
    assert block.keys() == {"attention"} and block["attention"].keys() == {"qkv"}
    with pytest.raises(UserError, match=r"finetune\.lora\.targets.*'query'"):
        build.build(tiny.config("clip", init__weights="x", finetune__lora={"rank": 2, "targets": ("query",)}))
    with pytest.raises(UserError, match=r"finetune\.lora\.rank adapts given weights"):
        build.build(tiny.config("clip", finetune__lora__rank=2))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_layers_stay_bit_for_bit(scan):
    frozen = ("img.embed", "img.blocks.0-1", "txt.blocks.0")
    before, after, _ = trained(model__img__scan=scan, model__img__depth=3, init__freeze=frozen)

    def blocks(params):
        stack = params["img"]["transformer"]
        return [jax.tree.map(lambda x, i=i: x[i], stack["blocks"]) if scan else stack[f"block_{i}"] for i in range(3)]

    for i, (old, new) in enumerate(zip(blocks(before.params), blocks(after.params), strict=True)):
        same = jax.tree.leaves(jax.tree.map(np.array_equal, old, new))
        assert all(same) if i < 2 else not any(same)
    for name in ("patches", "positions", "cls"):
        chex.assert_trees_all_equal(after.params["img"][name], before.params["img"][name])
    chex.assert_trees_all_equal(after.params["txt"]["transformer"], before.params["txt"]["transformer"])
    assert not np.array_equal(after.params["txt"]["tokens"], before.params["txt"]["tokens"])


def test_blocks_that_a_tower_lacks_are_named():
    with pytest.raises(UserError, match=r"init\.freeze has 'img\.blocks\.0-5'; blocks of img are 0 to 0\."):
        build.build(tiny.config("clip", init__freeze=("img.blocks.0-5",)))
    for place in ("embed", "blocks.0"):
        with pytest.raises(UserError, match="img has no blocks"):
            optim.trained({"img": {}}, (f"img.{place}",), {"img": types.SimpleNamespace(num_layers=1)})
