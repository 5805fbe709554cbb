"""The pre-norm transformer that both towers share.

Parameters carry logical axis names ("embed", "mlp", "heads", "kv", ...); which mesh axis each one lives on is decided
in `xclip_jax.parallel`. Shapes: b batch, n tokens, d width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.parallel.sharding import constrain

Array = jax.Array
Initializer = Callable[..., Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),  # erf form: open_clip
    "gelu_tanh": partial(nn.gelu, approximate=True),  # flax's default, big_vision
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's released weights
}
# "dots" keeps matrix products and recomputes the rest; "full" keeps only the input of each block.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def named(init: Initializer, *axes: str | None) -> Initializer:
    """`init` with logical axis names attached to the parameter that it makes."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    dtype: Any,
    axis: int | tuple[int, ...] = -1,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.DenseGeneral:
    """A linear map with a normal(0, std) kernel whose dimensions are named `axes`; parameters in fp32."""
    bias_axes = axes[len(axes) - (len(features) if isinstance(features, tuple) else 1) :]
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.normal(std), *axes),
        bias_init=named(nn.initializers.zeros, *bias_axes),
        name=name,
    )


class LayerNorm(nn.Module):
    """LayerNorm computed in fp32 and returned in `dtype`. CLIP's eps is 1e-5, timm's 1e-6."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = nn.LayerNorm(
            epsilon=self.eps,
            dtype=jnp.float32,
            scale_init=named(nn.initializers.ones, "norm"),
            bias_init=named(nn.initializers.zeros, "norm"),
            name="norm",
        )
        return norm(x).astype(self.dtype)


def attend(query: Array, key: Array, value: Array, *, causal: bool = False) -> Array:
    """Scaled dot-product attention, softmax in fp32. (b, heads, n, kv), twice (b, heads, m, kv) -> (b, heads, n, kv).

    With heads before tokens both products are plain batched matrix products: a third faster on a CPU than
    `jax.nn.dot_product_attention`, whose layout suits kernels for long sequences; ours are 50 to 577 tokens.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", query * scale, key, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool), logits, -jnp.inf)
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(logits).astype(value.dtype), value)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in fp32. (b, n, d) -> (b, n, d), or (b, 1, d) where only the `first` asks."""

    heads: int
    out_std: float
    causal: bool = False
    dtype: Any = jnp.float32
    first: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        features = (3, self.heads, d // self.heads)
        qkv = dense(features, ("embed", None, "heads", "kv"), std=d**-0.5, dtype=self.dtype, name="qkv")(x)
        query, key, value = einops.rearrange(qkv, "b n c heads kv -> c b heads n kv")
        query = query[:, :, :1] if self.first else query
        x = einops.rearrange(attend(query, key, value, causal=self.causal), "b heads n kv -> b n heads kv")
        return dense(d, ("heads", "kv", "embed"), std=self.out_std, dtype=self.dtype, axis=(-2, -1), name="out")(x)


class Mlp(nn.Module):
    """Two linear maps around an activation. (..., d) -> (..., d)."""

    hidden: int
    out_std: float
    act: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        x = dense(self.hidden, ("embed", "mlp"), std=(2 * d) ** -0.5, dtype=self.dtype, name="up")(x)
        x = ACTIVATIONS[self.act](x)
        return dense(d, ("mlp", "embed"), std=self.out_std, dtype=self.dtype, name="down")(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Returns a pair, as `nn.scan` asks. (b, n, d) -> (b, n, d).

    `keep` (b, 2) multiplies the two branches of each sample, where given. With `first` only the first token is
    computed, (b, 1, d).
    """

    heads: int
    mlp_ratio: float
    out_std: float
    causal: bool
    act: str
    eps: float
    dtype: Any
    first: bool = False

    @nn.compact
    def __call__(self, x: Array, keep: Array | None = None) -> tuple[Array, None]:
        def kept(branch: Array, i: int) -> Array:
            return branch if keep is None else branch * keep[:, i, None, None].astype(branch.dtype)

        hidden = int(self.mlp_ratio * x.shape[-1])
        attention = Attention(self.heads, self.out_std, self.causal, self.dtype, self.first, name="attention")
        mlp = Mlp(hidden, self.out_std, self.act, self.dtype, name="mlp")
        x = constrain(x, "batch", None, None)
        y = attention(LayerNorm(self.eps, self.dtype, name="norm_1")(x))
        x = (x[:, :1] if self.first else x) + kept(y, 0)
        x = x + kept(mlp(LayerNorm(self.eps, self.dtype, name="norm_2")(x)), 1)
        return constrain(x, "batch", None, None), None


class Transformer(nn.Module):
    """`depth` blocks. (b, n, d) -> (b, n, d).

    `scan` stacks the blocks' parameters and compiles one block (on a CPU it costs about 25 %); `remat` says what the
    backward pass recomputes. The two are independent. With `first` no token but the first is read, and the last of
    unrolled blocks computes no other: (b, 1, d).

    With `noise` (b, depth, 2), uniform, blocks are left out of a training pass (stochastic depth, arXiv 1603.09382):
    each branch of a sample with a probability that rises from 0 in the first block to `drop_path` in the last; what
    stays counts for more. The noise comes from outside, one row a sample, as that of patch dropout.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    causal: bool = False
    act: str = "gelu"
    eps: float = 1e-5
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    drop_path: float = 0.0
    first: bool = False

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None) -> Array:
        # CLIP's initialisation: the residual branches' last maps shrink with depth.
        out_std = x.shape[-1] ** -0.5 * (2 * self.depth) ** -0.5
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        keep = None
        if noise is not None and self.drop_path:
            rates = self.drop_path * jnp.arange(self.depth)[:, None, None] / max(self.depth - 1, 1)
            keep = (noise.swapaxes(0, 1) >= rates) / (1 - rates)  # (depth, b, 2)
        args = (self.heads, self.mlp_ratio, out_std, self.causal, self.act, self.eps, self.dtype)
        if self.scan:
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked(*args, name="blocks")(x, keep)[0]
        for i in range(self.depth):
            first = self.first and i == self.depth - 1
            x, _ = block(*args, first, name=f"block_{i}")(x, None if keep is None else keep[i])
        return x


def tower_conflicts(width: int, heads: int, mlp_ratio: float) -> Iterator[str]:
    """Sizes of a transformer that do not go together, a sentence each."""
    if width % heads:
        yield f"width {width} must be a multiple of heads {heads}"
    if int(mlp_ratio * width) < 1:
        yield f"mlp_ratio {mlp_ratio} of width {width} leaves the MLP without a hidden unit"


def stack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Parameters of an unrolled `Transformer` -> the same ones in the scanned layout (leading axis of `depth`)."""
    blocks = [params[f"block_{i}"] for i in range(depth)]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)}
