"""Options of the TPU compiler, and what they make of a step; libtpu compiles without a TPU."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xclip_jax.commands import plan
from xclip_jax.config import load as config_file
from xclip_jax.parallel import compiler
from xclip_jax.train import cost
from xclip_jax.train.cost.roofline import CHIPS

pytestmark = pytest.mark.long

SLICED = "windowed_dot_general"
TOPOLOGIES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def devices(topology):
    pytest.importorskip("libtpu")
    return plan.devices_of(topology)[0]


def test_an_order_changes_no_gradient():
    """On TPUs the gradient of images waits; its value is the chain rule's."""
    x, params = jnp.arange(3.0), {"small": jnp.float32(2), "large": jnp.full(compiler._SMALL, 3.0)}

    def loss(x, params, order):
        x, params = order(x, params)
        return jnp.sum(x**2) * params["small"] + jnp.sum(params["large"] ** 2) * x[1]

    plain = jax.grad(loss, (0, 1))(x, params, lambda *both: both)
    chex.assert_trees_all_close(jax.grad(loss, (0, 1))(x, params, compiler.ordered_after_small), plain, rtol=1e-6)


def test_several_gpus_have_options_that_xla_knows(monkeypatch):
    """XLA checks the options of every platform on each of them, and so on this CPU, which has none."""
    assert compiler.options(jax.devices()) == {}
    gpus = [types.SimpleNamespace(platform="gpu", device_kind="NVIDIA", process_index=0)] * 2
    accepts = compiler._accepts
    monkeypatch.setattr(compiler, "_accepts", lambda options, _: accepts(options, jax.devices()[0]))
    assert compiler.options(gpus) == compiler._GPUS != {}
    assert compiler.options(gpus[:1]) == {}
    monkeypatch.setattr(compiler, "_GPUS", compiler._GPUS | {"xla_gpu_no_such_option": True})
    monkeypatch.setenv("XLA_FLAGS", f"--xla_something=1 --{next(iter(compiler._GPUS))}=false")
    assert compiler.options(gpus) == {}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_generation_accepts_all_options(topology):
    chips = devices(topology)
    later = {} if topology.startswith("v4") else compiler._TPU_OVERLAP
    assert compiler.options(chips) == {**compiler._TPU, **later, **compiler._TPU_KINDS.get(chips[0].device_kind, {})}


def test_a_weight_gradient_that_ends_split_is_one_product():
    chips = devices("v5e:4x4")
    mesh = Mesh(np.array(chips), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def gradient(x, g):
        product = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))
        return jax.lax.with_sharding_constraint(product, split).astype(jnp.float32)

    rows = [jax.ShapeDtypeStruct((len(chips) * 6400, d), jnp.bfloat16, sharding=split) for d in (768, 3072)]
    sliced = [
        SLICED in jax.jit(gradient, compiler_options=options).lower(*rows).compile().as_text()
        for options in ({}, dict(compiler.options(chips)))
    ]
    assert sliced == [True, False]


@pytest.mark.slow
def test_remat_computes_again_on_tpus():
    """Blocks are unrolled there, where XLA would merge what is computed again unless a barrier is in between."""
    chips = devices("v5e:2x2")
    flops = {}
    for remat in ("none", "full"):
        config = config_file.load_config("pretrain:objective=clip,preset=Ti/12,batch=256")
        for tower in (config.model.img, config.model.txt):
            tower.remat, tower.depth = remat, 2
        config.data.length_groups = "full"
        _, compiled, trouble = cost.compile_config(config, chips, CHIPS["v5e"].memory)
        assert not trouble
        flops[remat] = compiled.cost_analysis()["flops"]
    assert flops["full"] > 1.15 * flops["none"]
