"""Layers of towers and heads: linear maps, norms, attention and MLPs.

Parameters are fp32 and have logical axis names ("embed", "mlp", "heads", "kv", ...), which `xclip_jax.parallel` maps
to mesh axes. Shapes: b batch, n tokens, d width.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from xclip_jax.models import kernels
from xclip_jax.parallel.sharding import device, map_devices, platform, shards_of

Array = jax.Array
Initializer = Callable[..., Any]


def named(init: Initializer, *axes: str | None) -> Initializer:
    """Attach logical axis names to the parameters that `init` makes."""
    return nn.with_logical_partitioning(init, axes)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """Multiply (rows, inputs) by (inputs, outputs); in the kernel's gradient, x^T g, transpose the narrower factor.

    XLA's CPU backend copies a transposed left factor, which has one row per token of the batch. Copying the wider
    factor would take a fifth of a step.
    """
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = operands
    # A transposed kernel would be gathered a second time if it is sharded.
    grad_x = jax.lax.dot_general(g, kernel, (((1,), (1,)), ((), ())))
    rows = (((0,), (0,)), ((), ()))
    if platform() == "tpu":
        # Without a fixed layout XLA would choose the layout of the heads, and copy the transposed g.
        return grad_x, with_layout_constraint(jax.lax.dot_general(x, g, rows), Layout(major_to_minor=(0, 1)))
    narrow = x.shape[1] <= g.shape[1]
    return grad_x, jax.lax.dot_general(x, g, rows) if narrow else jax.lax.dot_general(g, x, rows).T


matmul.defvjp(_matmul_forward, _matmul_backward)


def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    """Apply `matmul` for `nn.DenseGeneral`: contract the last axes of x with the first axes of the kernel."""
    (contracted, _), _ = dimensions
    n = len(contracted)
    rows, outputs = x.shape[: x.ndim - n], kernel.shape[n:]
    inputs = math.prod(kernel.shape[:n])
    return matmul(x.reshape(-1, inputs), kernel.reshape(inputs, -1)).reshape(*rows, *outputs)


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    dtype: DTypeLike,
    axis: int | tuple[int, ...] = -1,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.DenseGeneral:
    """Make a linear map with a normal(0, std) kernel and the logical `axes`; parameters in fp32."""
    bias_axes = axes[len(axes) - (len(features) if isinstance(features, tuple) else 1) :]
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.normal(std), *axes),
        bias_init=named(nn.initializers.zeros, *bias_axes),
        dot_general=dot_general,
        name=name,
    )


def gelu(x: Array) -> Array:
    """Return x times the standard normal cumulative distribution, computed in fp32 by erf.

    Slower alternatives: on CPUs jax's form by erfc; on TPUs bf16, which makes the largest product a third longer.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,  # open_clip
    "gelu_tanh": partial(nn.gelu, approximate=True),  # flax's default, big_vision
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's released weights
}


@dataclasses.dataclass(frozen=True)
class Style:
    """Architecture details of published weights: the tower, and its projection to the shared embedding."""

    act: str = "gelu"  # in `ACTIVATIONS`
    eps: float = 1e-5  # added to the variance in LayerNorm
    pre_norm: bool = True  # LayerNorm before the first block of the image tower
    patch_bias: bool = False  # bias of the linear map from patches to tokens
    project_img: bool = True  # learned projection of images
    project_bias: bool = False  # bias in the projection


STYLES = {
    "xclip": Style(),  # open_clip's
    "openai": Style("quick_gelu"),
    "tanh": Style("gelu_tanh"),
    "siglip": Style("gelu_tanh", 1e-6, pre_norm=False, patch_bias=True, project_img=False, project_bias=True),
}


NORM: dict[str, Any] = {  # options of Flax's norms
    "dtype": jnp.float32,
    "scale_init": named(nn.initializers.ones, "norm"),
    "bias_init": named(nn.initializers.zeros, "norm"),
}


class LayerNorm(nn.Module):
    """LayerNorm computed in fp32 and returned in `dtype`. CLIP's eps is 1e-5, timm's 1e-6."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.LayerNorm(epsilon=self.eps, **NORM, name="norm")(x).astype(self.dtype)


def token_at(x: Array, at: Array) -> Array:
    """Select one token per sequence, (b, n, d), int (b,) -> (b, 1, d)."""
    return jnp.take_along_axis(x, at[:, None, None], axis=1)


def attend(query: Array, key: Array, value: Array, *, causal: bool = False, at: Array | None = None) -> Array:
    """Compute scaled dot-product attention with an fp32 softmax, (b, heads, n, kv), (b, heads, m, kv), same -> first.

    `at` (b,) is the position of a single query per sequence: n is 1. With heads before tokens both products are plain
    batched matrix products: a third faster on a CPU than `jax.nn.dot_product_attention`, made for long sequences.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", query * scale, key, preferred_element_type=jnp.float32)
    if causal:
        n, m = logits.shape[2:]
        before = jnp.tri(n, m, dtype=bool) if at is None else (jnp.arange(m) <= at[:, None])[:, None, None]
        logits = jnp.where(before, logits, -jnp.inf)
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(logits).astype(value.dtype), value)


class HeadProjections(nn.Module):
    """Linear maps of tokens to heads with parameters in one array, (b, n, d) -> `count` times (b, heads, n, kv).

    Each map is a separate product, since the gradient of slicing one product would pad each map to the full size. With
    `at` (b,) the first map reads only these tokens, (b, heads, 1, kv). With `fused` the result is one product and its
    bias, still to be added: (b, n, count * d) and fp32 (1, count * d), in the order of `models.kernels.attention`.
    """

    count: int
    heads: int
    dtype: DTypeLike = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array, at: Array | None = None) -> tuple[Array, ...]:
        d = x.shape[-1]
        shape, axes = (self.count, self.heads, d // self.heads), (None, "heads", "kv")
        kernel = self.param("kernel", named(nn.initializers.normal(d**-0.5), "embed", *axes), (d, *shape))
        bias = self.param("bias", named(nn.initializers.zeros, *axes), shape)
        contract = (((2,), (0,)), ((), ()))
        if self.fused:
            x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
            product = dot_general(x, kernels.group_heads(kernel), contract)
            return product, kernels.group_heads(bias)[None]
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        tokens = [x if at is None or i else token_at(x, at) for i in range(self.count)]
        maps = [dot_general(tokens[i], kernel[:, i], contract) + bias[i] for i in range(self.count)]
        return tuple(einops.rearrange(y, "b n heads kv -> b heads n kv") for y in maps)


class Attention(nn.Module):
    """Multi-head self-attention with an fp32 softmax, (b, n, d) -> (b, n, d), or (b, 1, d) for the tokens `at` (b,).

    If `fused` is above 0, `kernels.attention` computes it, and tokens after the first `fused` are padding. On GPUs
    cuDNN computes it if it accepts the shapes.
    """

    heads: int
    out_std: float
    causal: bool = False
    dtype: DTypeLike = jnp.float32
    fused: int = 0

    @nn.compact
    def __call__(self, x: Array, at: Array | None = None) -> Array:
        d = x.shape[-1]
        maps = HeadProjections(3, self.heads, self.dtype, bool(self.fused), name="qkv")(x, at)
        if self.fused:
            kv = d // self.heads
            axes = ("batch", None, "heads")
            x = map_devices(
                lambda *qkv: kernels.attention(*qkv, kv, self.fused, self.causal), maps, (axes, (None, "heads")), axes
            )
            x = einops.rearrange(x, "b n (heads kv) -> b n heads kv", kv=kv)
        elif at is None and self._cudnn_accepts(maps[0]):
            axes = ("batch", "heads", None, None)
            x = map_devices(lambda *qkv: kernels.cudnn_attention(*qkv, causal=self.causal), maps, (axes,) * 3, axes)
            x = einops.rearrange(x, "b heads n kv -> b n heads kv")
        else:
            x = einops.rearrange(attend(*maps, causal=self.causal, at=at), "b heads n kv -> b n heads kv")
        return dense(d, ("heads", "kv", "embed"), std=self.out_std, dtype=self.dtype, axis=(-2, -1), name="out")(x)

    def _cudnn_accepts(self, query: Array) -> bool:
        _, heads, n, kv = query.shape
        on = device()
        shape = 2, heads // shards_of("heads"), n, kv  # the batch makes no difference to cuDNN
        return on is not None and kernels.cudnn_accepts(on, shape, query.dtype, self.causal)


class Mlp(nn.Module):
    """Two linear maps around an activation, (..., d) -> (..., d)."""

    hidden: int
    out_std: float
    act: str = "gelu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        x = dense(self.hidden, ("embed", "mlp"), std=(2 * d) ** -0.5, dtype=self.dtype, name="up")(x)
        x = ACTIVATIONS[self.act](x)
        return dense(d, ("mlp", "embed"), std=self.out_std, dtype=self.dtype, name="down")(x)
