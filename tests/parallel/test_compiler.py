"""Options of the TPU compiler, and what they make of a step; libtpu compiles without a TPU."""

import re
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
from xclip_jax.plan.hlo import collectives, summary
from xclip_jax.plan.roofline import roofline
from xclip_jax.train import cost

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
    overlap = {} if topology.startswith("v4") else compiler._TPU_OVERLAP
    assert compiler.options(devices(topology)) == {**compiler._TPU, **overlap}


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
@pytest.mark.parametrize(
    ("topology", "strategy"), [("v5e:4x8", "dp"), ("v6e:4x8", "dp"), ("v5p:4x4x4", "dp"), ("v5e:4x4", "fsdp")]
)
def test_a_step_of_full_width(topology, strategy):
    """No sliced product and no scores; of collectives at least 90 % of the time is hidden, by the plan's model."""
    chips = devices(topology)
    config = config_file.load_config(f"pretrain:objective=clip,preset=B/16,batch={64 * len(chips)}")
    config.model.img.depth = config.model.txt.depth = 3
    config.mesh.strategy, config.data.length_groups = strategy, "full"
    if strategy == "fsdp":
        config.mesh.fsdp = 8
    experiment, compiled, trouble = cost.compile_config(config, chips)
    program = compiled.as_text()
    assert not trouble and SLICED not in program
    assert program.count("tpu_custom_call") >= 12  # two towers of three blocks, forward and backward
    # Scores are (images, heads, tokens, tokens), with or without the tokens of padding.
    assert not re.search(r"\[(?:\d+,)+(197,197|200,200|77,77|80,80)\]", program)
    if strategy == "dp":
        parameters = sum(x.size for x in jax.tree.leaves(experiment.abstract.params))
        sent = summary(collectives(program, len(chips)))
        assert sent["all-reduce"] >= 2 * parameters  # each gradient in two bytes or four
        assert sent["all-reduce"] > 0.8 * sum(sent.values())
        account = roofline(program, topology, len(chips))
        assert account.hidden_ms > 0.9 * (account.hidden_ms + account.exposed_ms) > 0


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
        _, compiled, trouble = cost.compile_config(config, chips)
        assert not trouble
        flops[remat] = compiled.cost_analysis()["flops"]
    assert flops["full"] > 1.15 * flops["none"]
