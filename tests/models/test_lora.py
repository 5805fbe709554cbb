import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import UserError
from xclip_jax.data import loader
from xclip_jax.models import lora
from xclip_jax.train import build, state


def test_only_adapters_change_in_the_towers():
    changes = {"model__scan": True, "model__img__depth": 2, "finetune__lora__rank": 3}
    p = build.build(tiny.config("clip", init__weights="x", optim__weight_decay=0.5, **changes))
    s = state.create(p.init, p.abstract)
    before = jax.device_get(s)
    for i in range(2):
        s, _ = p.compiled(s, loader.to_global(tiny.batch(i), p.mesh))
    after = jax.device_get(s)
    chex.assert_trees_all_equal(before.variables()["params"], lora.merged({**before.params, "lora": {}}))
    assert before.variables()["params"].keys() == before.params.keys() - {"lora"}
    for name in ("img", "txt"):
        chex.assert_trees_all_equal(after.params[name], before.params[name])
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(after.params["lora"]))
    moving = [after.params[name] for name in after.params if name not in ("img", "txt")]
    moments = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(moving) if x.ndim)
    assert p.num_parameters == build.build(tiny.config("clip", model__img__depth=2)).num_parameters
    # Merged kernels are sums of products.
    merged = after.variables()["params"]["img"]["transformer"]["blocks"]
    given = after.params["img"]["transformer"]["blocks"]
    factors = after.params["lora"]["img"]["transformer"]["blocks"]
    for part, name in (("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down")):
        a, b = (np.float64(factors[part][name]["kernel"][x]) for x in ("inputs", "outputs"))
        kernel = given[part][name]["kernel"]
        expected = kernel + np.einsum("lir,lro->lio", a, b).reshape(kernel.shape)
        np.testing.assert_allclose(merged[part][name]["kernel"], expected, rtol=0, atol=1e-6)
    chex.assert_trees_all_equal(merged["norm_1"], given["norm_1"])


def test_a_tower_without_adapters_is_refused():
    params = {"img": {"convolutions": {"mlp": {"up": {"kernel": jnp.ones((8, 8))}}}}}
    with pytest.raises(UserError, match="the tower 'img' has no transformer with kernels qkv, out, up"):
        lora.initial(params, lora.LoraConfig(rank=2), jax.random.key(0))


def test_an_adapter_larger_than_its_kernel_is_refused():
    params = {"img": {"transformer": {"block_0": {"mlp": {"up": {"kernel": jnp.ones((8, 16))}}}}}}
    lora.initial(params, lora.LoraConfig(rank=8), jax.random.key(0))
    with pytest.raises(UserError, match=r"rank is 9, above the size of the kernel img/transformer/block_0/mlp/up, 8 x"):
        lora.initial(params, lora.LoraConfig(rank=9), jax.random.key(0))
    with pytest.raises(UserError, match=r"finetune\.lora\.rank adapts given weights"):
        build.build(tiny.config("clip", finetune__lora__rank=2))
