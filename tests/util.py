"""What tests of models share: variables without an initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# These tests compile far more than they compute: without LLVM's optimisation they take half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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
