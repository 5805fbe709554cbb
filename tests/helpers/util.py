"""What tests share: towers by their sizes, variables without an initialisation, gradients, and a free port."""

import contextlib
import functools
import itertools
import os
import socket

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from xclip_jax.models.heads import ClusterHeadConfig
from xclip_jax.models.transformer import TextTowerConfig
from xclip_jax.models.two_towers import ModelConfig, TwoTowers
from xclip_jax.models.vit import ImageTowerConfig
from xclip_jax.objectives.clip import Clip, Siglip
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.parallel.mesh import batch_sharding, make_mesh

# These tests compile far more than they compute: without LLVM's optimisation they take half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def two_towers(*, img, txt, embed=0, bias=False, cluster_head=None, dtype=jnp.float32, cls=TwoTowers):
    """`cls` with projections to `embed` above 0, a logit bias, cluster heads; blocks are unrolled."""
    txt = dict(txt)
    tokens = {key: txt.pop(key, default) for key, default in (("vocab", 49408), ("eot_id", 49407))}
    towers = ImageTowerConfig(**{"scan": False} | img), TextTowerConfig(**{"scan": False} | txt)
    options = {"embed": embed, "dtype": jnp.dtype(dtype).name}
    options["cluster_head"] = ClusterHeadConfig(**cluster_head or {})
    model = ModelConfig(*towers, **options)
    heads = {}
    if embed:
        heads |= (Siglip() if bias else Clip()).heads(model, tokens["vocab"])
    if cluster_head:
        heads |= Nclip().heads(model, tokens["vocab"])
    return cls(*towers, **tokens, heads=heads, dtype=dtype)


def random_variables(module, *args, seed=0, std=0.2):
    """Unboxed variables of `module` called with `args`, none of them zero or one; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        value = std * rng.normal(size=x.shape)
        if path[-1].key == "scale":
            value = 1 + value
        elif path[-1].key == "var":
            value = 1 + np.abs(value)
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)))


def rows_over(devices=8):
    """Sharding of the first dimension over this many devices."""
    return batch_sharding(make_mesh({"data": devices, "fsdp": 1, "model": 1}, jax.devices()[:devices]))


def central_differences(f, args, step=1e-6):
    """Gradients of the scalar f(*args) by each float64 array or scalar in args."""
    args = [np.array(arg, np.float64) for arg in args]
    grads = []
    for arg in args:
        grad = np.zeros_like(arg)
        for index in np.ndindex(arg.shape):
            value = arg[index]
            arg[index] = value + step
            above = f(*args)
            arg[index] = value - step
            grad[index] = (above - f(*args)) / (2 * step)
            arg[index] = value
        grads.append(grad)
    return grads


def assert_close(actual, expected, tolerance):
    """Elementwise, relative to the largest entry of each array."""
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


_probed = itertools.count()


def free_address() -> str:
    """An address for processes that a test starts, which nothing takes until they do.

    Its port is below those that systems hand out, and in a block of this process: others rarely get it meanwhile.
    """
    for number in itertools.islice(_probed, 1000):
        port = 20_000 + (100 * os.getpid() + number) % 10_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return f"localhost:{port}"
    raise OSError("no port is free")
