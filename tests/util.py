"""What tests of models share: variables without an initialisation, and open_clip's weights in our layout."""

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


def from_open_clip(weights, *, heads_img, heads_txt, pool="cls"):
    """Arrays by their names in open_clip's `CLIP` -> parameters of `TwoTowers`, unrolled.

    The map is linear and loses nothing, so it carries gradients over as well as weights.
    """

    def norm(name):
        return {"norm": {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}}

    def linear(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def block(name, heads):
        in_proj, out = weights[f"{name}.attn.in_proj_weight"], linear(f"{name}.attn.out_proj")
        d = in_proj.shape[1]
        qkv = {
            "kernel": in_proj.T.reshape(d, 3, heads, d // heads),
            "bias": weights[f"{name}.attn.in_proj_bias"].reshape(3, heads, d // heads),
        }
        out = {"kernel": out["kernel"].reshape(heads, d // heads, d), "bias": out["bias"]}
        return {
            "norm_1": norm(f"{name}.ln_1"),
            "attention": {"qkv": qkv, "out": out},
            "norm_2": norm(f"{name}.ln_2"),
            "mlp": {"up": linear(f"{name}.mlp.c_fc"), "down": linear(f"{name}.mlp.c_proj")},
        }

    def transformer(name, heads):
        depth = 0
        while f"{name}.resblocks.{depth}.ln_1.weight" in weights:
            depth += 1
        return {f"block_{i}": block(f"{name}.resblocks.{i}", heads) for i in range(depth)}

    conv = weights["visual.conv1.weight"]  # (d, 3, p, p)
    img = {
        "patches": {"kernel": conv.transpose(2, 3, 1, 0).reshape(-1, conv.shape[0])},
        "positions": weights["visual.positional_embedding"],
        "transformer": transformer("visual.transformer", heads_img),
        "norm_post": norm("visual.ln_post"),
    }
    if "visual.ln_pre.weight" in weights:
        img["norm_pre"] = norm("visual.ln_pre")
    if pool == "cls":
        img["cls"] = weights["visual.class_embedding"]
    else:
        img["positions"] = img["positions"][1:]
    txt = {
        "tokens": weights["token_embedding.weight"],
        "positions": weights["positional_embedding"],
        "transformer": transformer("transformer", heads_txt),
        "norm_post": norm("ln_final"),
    }
    return {
        "img": img,
        "txt": txt,
        "proj_img": {"linear": {"kernel": weights["visual.proj"]}},
        "proj_txt": {"linear": {"kernel": weights["text_projection"]}},
        "log_scale": weights["logit_scale"],
    }
