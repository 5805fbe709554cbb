"""The pre-norm transformer that both towers share, and its config keys.

Parameters carry logical axis names ("embed", "mlp", "heads", "kv", ...); which mesh axis each one lives on is decided
in `xclip_jax.parallel`. Shapes: b batch, n tokens, d width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Self

import einops
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import above, at_least, choice, key
from xclip_jax.kernels import attention as attention_kernel
from xclip_jax.kernels import cudnn
from xclip_jax.models.linear import dense, dot_general, named
from xclip_jax.models.tower import Params, Tower
from xclip_jax.parallel import compiler
from xclip_jax.parallel.sharding import constrain, device, map_devices, note, platform, shards_of

Array = jax.Array


def gelu(x: Array) -> Array:
    """x times the normal distribution's cumulative probability at x.

    In fp32 by erf, whatever the type of x: jax's form, by erfc, is slower on CPUs, and in bf16 it makes a TPU's largest
    product a third longer.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,  # open_clip
    "gelu_tanh": partial(nn.gelu, approximate=True),  # flax's default, big_vision
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's released weights
}
# "dots" keeps matrix products and recomputes the rest; "full" keeps only the input of each block.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention_kernel.OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerNorm(nn.Module):
    """LayerNorm computed in fp32 and returned in `dtype`. CLIP's eps is 1e-5, timm's 1e-6."""

    eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

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


def token_at(x: Array, at: Array) -> Array:
    """The token of each sequence at its position. (b, n, d), int (b,) -> (b, 1, d)."""
    return jnp.take_along_axis(x, at[:, None, None], axis=1)


def attend(query: Array, key: Array, value: Array, *, causal: bool = False, at: Array | None = None) -> Array:
    """Scaled dot-product attention, softmax in fp32. (b, heads, n, kv), twice (b, heads, m, kv) -> (b, heads, n, kv).

    With `at` (b,) queries are those of one token of each sequence, at this position: n is 1.

    With heads before tokens both products are plain batched matrix products: a third faster on a CPU than
    `jax.nn.dot_product_attention`, whose layout suits kernels for long sequences; ours are 50 to 577 tokens.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", query * scale, key, preferred_element_type=jnp.float32)
    if causal:
        n, m = logits.shape[2:]
        before = jnp.tri(n, m, dtype=bool) if at is None else (jnp.arange(m) <= at[:, None])[:, None, None]
        logits = jnp.where(before, logits, -jnp.inf)
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(logits).astype(value.dtype), value)


class HeadProjections(nn.Module):
    """Linear maps of tokens to heads whose parameters are one array. (b, n, d) -> `count` times (b, heads, n, kv).

    Each map is a product of its own: the gradient of cutting one product into queries, keys and values pads each of
    them to the whole. With `at` (b,) the first map reads these tokens alone: (b, heads, 1, kv).

    Where `fused`, the result is one product and the bias that is not yet added to it, (b, n, count * d) and fp32
    (1, count * d), in the order of `kernels.attention`.
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
            return dot_general(x, attention_kernel.group_heads(kernel), contract), attention_kernel.group_heads(bias)[
                None
            ]
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        tokens = [x if at is None or i else token_at(x, at) for i in range(self.count)]
        maps = [dot_general(tokens[i], kernel[:, i], contract) + bias[i] for i in range(self.count)]
        return tuple(einops.rearrange(y, "b n heads kv -> b heads n kv") for y in maps)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in fp32. (b, n, d) -> (b, n, d), or (b, 1, d) of the tokens `at` (b,).

    With `fused` tokens it is computed by `kernels.attention`: the first `fused` of n count, the others are padding.
    On GPUs cuDNN computes it, where it accepts these sizes.
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
        by = "a Pallas kernel" if self.fused else "cuDNN" if at is None and self._cudnn_accepts(maps[0]) else "XLA"
        if at is None:
            note(f"attention of {self.fused or x.shape[1]} tokens of {d}", f"by {by}")
        if self.fused:
            x = self._attend_fused(*maps)
        elif by == "cuDNN":
            axes = ("batch", "heads", None, None)
            x = map_devices(lambda *qkv: cudnn.attention(*qkv, causal=self.causal), maps, (axes,) * 3, axes)
            x = einops.rearrange(x, "b heads n kv -> b n heads kv")
        else:
            x = einops.rearrange(attend(*maps, causal=self.causal, at=at), "b heads n kv -> b n heads kv")
        return dense(d, ("heads", "kv", "embed"), std=self.out_std, dtype=self.dtype, axis=(-2, -1), name="out")(x)

    def _cudnn_accepts(self, query: Array) -> bool:
        """Whether cuDNN computes attention of these queries on this process's devices."""
        _, heads, n, kv = query.shape
        on = device()
        # The batch makes no difference to cuDNN.
        return on is not None and cudnn.accepts(on, (2, heads // shards_of("heads"), n, kv), query.dtype, self.causal)

    def _attend_fused(self, qkv: Array, bias: Array) -> Array:
        """(b, n, 3 * d), (1, 3 * d) -> (b, n, heads, kv)."""
        kv = qkv.shape[-1] // 3 // self.heads
        axes = ("batch", None, "heads")

        def on_device(qkv: Array, bias: Array) -> Array:
            return attention_kernel.attention(qkv, bias, kv, self.fused, self.causal, platform() != "tpu")

        x = map_devices(on_device, (qkv, bias), (axes, (None, "heads")), axes)
        return einops.rearrange(x, "b n (heads kv) -> b n heads kv", kv=kv)


class Mlp(nn.Module):
    """Two linear maps around an activation. (..., d) -> (..., d)."""

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


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Tower):
    """Config keys of a tower that is a `Transformer` between its embeddings and its features."""

    before: ClassVar[tuple[str, ...]] = ()  # parameters ahead of the blocks

    width: int = key(512, "channels of a token", at_least(1))
    depth: int = key(12, "blocks", at_least(1))
    heads: int = key(8, "attention heads; they divide width", at_least(1))
    mlp_ratio: float = key(4.0, "hidden width of the MLP over width", above(0))
    act: str = key("gelu", "activation of the MLP", choice(ACTIVATIONS))
    eps: float = key(1e-5, "added to the variance in LayerNorm", above(0))
    scan: bool = key(True, "one compiled block for all of them, with stacked parameters")
    remat: str = key("none", "what the backward pass computes again in place of keeping it", choice(REMAT_POLICIES))

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.width % self.heads:
            yield f"width {self.width} must be a multiple of heads {self.heads}"
        if self.hidden < 1:
            yield f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves the MLP without a hidden unit"

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.width)

    def fuses(self, tokens: int, dtype: DTypeLike) -> bool:
        """Whether attention over `tokens` tokens is computed by `kernels.attention`."""
        on_chip = platform() == "tpu" and jnp.dtype(dtype) == jnp.bfloat16
        return on_chip and attention_kernel.fits(
            tokens, self.heads // shards_of("heads"), self.width // shards_of("heads")
        )

    def block_flops(self, tokens: float, *, one: bool = False) -> float:
        """FLOPs of a sequence in all blocks: four projections, two products of attention, and the MLP.

        With `one` the last block, where unrolled, computes keys and values of all tokens and the rest of one alone.
        """
        keys_values = 4 * self.width**2
        rest = 2 * self.width * (2 * self.width + 2 * self.hidden) + 4 * tokens * self.width
        going_on = (self.depth - 1) * tokens + 1 if one and not self.scan else self.depth * tokens
        return self.depth * tokens * keys_values + going_on * rest

    @property
    def num_layers(self) -> int:
        """Number of layers: the blocks, one before them and one after them (BEiT, arXiv 2106.08254)."""
        return self.depth + 2

    def layer_of(self, path: tuple[str, ...]) -> int | np.ndarray:
        """Layer of a parameter: 0 before the blocks, i + 1 in block i, depth + 1 after them."""
        if path[0] != "transformer":
            return 0 if path[0] in self.before else self.depth + 1
        return np.arange(1, self.depth + 1) if path[1] == "blocks" else 1 + int(path[1].removeprefix("block_"))

    def unrolled(self) -> Self:
        """The same function computed block by block."""
        return dataclasses.replace(self, scan=False, remat="none")

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Stack blocks or take them apart, as `scan` says."""
        blocks = params["transformer"]
        depth = len(jax.tree.leaves(blocks["blocks"])[0]) if "blocks" in blocks else len(blocks)
        if depth != self.depth:
            raise UserError(f"transformer has {depth} blocks, expected {self.depth}")
        if ("blocks" in blocks) != self.scan:
            blocks = stack_blocks(blocks, depth) if self.scan else unstack_blocks(blocks, depth)
        return {**params, "transformer": blocks}, []

    def facts(self) -> dict[str, str]:
        """{column: value} of the tower's row in a model card."""
        sizes = {"width": str(self.width), "depth": str(self.depth), "heads": str(self.heads)}
        return sizes | {"activation": self.act, "LayerNorm eps": f"{self.eps:g}"} | super().facts()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Returns a pair, as `nn.scan` asks. (b, n, d) -> (b, n, d).

    `keep` (b, 2) multiplies the two branches of each sample, where given. With `at` (b,) only these tokens are
    computed, (b, 1, d).
    """

    config: TransformerConfig
    causal: bool
    dtype: DTypeLike
    fused: int = 0

    @nn.compact
    def __call__(self, x: Array, keep: Array | None = None, at: Array | None = None) -> tuple[Array, None]:
        def kept(branch: Array, i: int) -> Array:
            return branch if keep is None else branch * keep[:, i, None, None].astype(branch.dtype)

        config = self.config
        # CLIP's initialisation: the residual branches' last maps shrink with depth.
        out_std = config.width**-0.5 * (2 * config.depth) ** -0.5
        attention = Attention(config.heads, out_std, self.causal, self.dtype, self.fused, name="attention")
        mlp = Mlp(config.hidden, out_std, config.act, self.dtype, name="mlp")
        x = constrain(x, "batch", None, None)
        y = attention(LayerNorm(config.eps, self.dtype, name="norm_1")(x), at)
        x = (x if at is None else token_at(x, at)) + kept(y, 0)
        x = x + kept(mlp(LayerNorm(config.eps, self.dtype, name="norm_2")(x)), 1)
        return constrain(x, "batch", None, None), None


class Transformer(nn.Module):
    """The blocks of `config`. (b, n, d) -> (b, n, d).

    `config.scan` stacks the blocks' parameters and compiles one block (on a CPU it costs about 25 %); `config.remat`
    says what the backward pass recomputes. The two are independent. On TPUs all blocks are compiled: what a loop keeps
    for the backward pass is copied into stacks and out of them, which takes a quarter of a step. With `at` (b,) only
    the tokens at these positions are read, and the last of unrolled blocks computes no other: (b, 1, d).

    With `noise` (b, depth, 2), uniform, blocks are left out of a training pass (stochastic depth, arXiv 1603.09382):
    each branch of a sample with a probability that rises from 0 in the first block to `drop_path` in the last; what
    stays counts for more. The noise comes from outside, one row a sample, as that of patch dropout.
    """

    config: TransformerConfig
    causal: bool = False
    drop_path: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None, at: Array | None = None) -> Array:
        depth, scan, remat = self.config.depth, self.config.scan, self.config.remat
        block = Block
        if remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
        keep = None
        if noise is not None and self.drop_path:
            rates = self.drop_path * jnp.arange(depth)[:, None, None] / max(depth - 1, 1)
            keep = (noise.swapaxes(0, 1) >= rates) / (1 - rates)  # (depth, b, 2)
        tokens = x.shape[1]
        fused_tokens = tokens if self.config.fuses(tokens, self.dtype) else 0
        if fused_tokens:
            x = jnp.pad(x, ((0, 0), (0, -tokens % attention_kernel.SUBLANES), (0, 0)))
        args = (self.config, self.causal, self.dtype)
        if scan and platform() == "tpu":
            note("blocks", "unrolled")
            return self._unrolled(x, keep, fused_tokens)[:, :tokens]
        if scan:
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                length=depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked(*args, fused_tokens, name="blocks")(x, keep)[0][:, :tokens]
        for i in range(depth):
            last = at if i == depth - 1 else None
            if last is not None:  # one query: no kernel, and no padding among the keys
                x, fused_tokens = x[:, :tokens], 0
            x, _ = block(*args, fused_tokens, name=f"block_{i}")(x, None if keep is None else keep[i], last)
        return x[:, :tokens]

    def _unrolled(self, x: Array, keep: Array | None, fused_tokens: int) -> Array:
        """Apply the blocks of stacked parameters one by one."""
        depth, remat = self.config.depth, self.config.remat

        def apply(params: Params, x: Array, keep: Array | None) -> Any:
            block = Block(self.config, self.causal, self.dtype, fused_tokens, parent=None)
            return block.apply({"params": flax.traverse_util.unflatten_dict(params)}, x, keep)[0]

        block = apply if remat == "none" else jax.checkpoint(apply, policy=REMAT_POLICIES[remat])
        stacks = flax.traverse_util.flatten_dict(self.variables["params"]["blocks"])
        # Kernels are cast before they are split: their gradients are summed over devices, and joined, in `dtype`.
        kernels = [path for path in stacks if path[-1] == "kernel"]
        stacks |= {path: stacks[path].astype(self.dtype) for path in kernels}
        # The gradient of one split is one concatenation; that of slices would be a sum of padded arrays.
        splits = {path: jax.lax.split(stack, (1,) * depth) for path, stack in stacks.items()}
        blocks = [{path: split[i][0] for path, split in splits.items()} for i in range(depth)]
        for i in range(depth):
            with jax.named_scope(f"block_{i}"):
                if i + 1 < depth:
                    # The gradients of the next block are summed over devices while those of this one are computed.
                    x, later = compiler.ordered(x, {path: blocks[i + 1][path] for path in kernels})
                    blocks[i + 1] |= later
                x = block(blocks[i], x, None if keep is None else keep[i])
        return x


def stack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Parameters of an unrolled `Transformer` -> the same ones in the scanned layout (leading axis of `depth`)."""
    blocks = [params[f"block_{i}"] for i in range(depth)]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """The inverse of `stack_blocks`."""
    return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)}
