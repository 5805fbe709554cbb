"""The pre-norm transformer of both towers, its config keys, and the text tower."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import above, at_least, choice, derived, key
from xclip_jax.models import block_kernels, kernels
from xclip_jax.models.layers import ACTIVATIONS, STYLES, Attention, LayerNorm, Mlp, Style, named, token_at
from xclip_jax.models.tower import Params, TextTower, Tower
from xclip_jax.parallel import compiler
from xclip_jax.parallel.sharding import constrain, device, map_devices, platform, shards_of

Array = jax.Array
TEXT_POOLS = ("eot", "last")
# "dots" keeps matrix products and recomputes the rest; "full" keeps only the input of each block.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(kernels.OUTPUT, block_kernels.PROJECTED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Tower):
    """Config keys of a tower with a `Transformer` between its embeddings and its features."""

    before: ClassVar[tuple[str, ...]] = ()  # parameters before the blocks

    width: int = key(512, "channels of a token", at_least(1))
    depth: int = key(12, "blocks", at_least(1))
    heads: int = key(8, "attention heads; they divide width", at_least(1))
    mlp_ratio: float = key(4.0, "hidden width of the MLP over width", above(0))
    style: str = key("xclip", "details fixed by published weights: activation, norms, projection", choice(STYLES))
    remat: str = key("none", "values to recompute in the backward pass", choice(REMAT_POLICIES), resume="free")
    scan: bool = derived(True)  # model.scan

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        if self.width % self.heads:
            yield f"width {self.width} must be a multiple of heads {self.heads}"
        if self.hidden < 1:
            yield f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves the MLP without a hidden unit"

    @property
    def details(self) -> Style:
        return STYLES[self.style]

    @property
    def hidden(self) -> int:
        return int(self.mlp_ratio * self.width)

    def fuses(self, tokens: int, dtype: DTypeLike) -> bool:
        """Return whether `models.kernels.attention` computes attention over `tokens` tokens."""
        parts = shards_of("heads")
        on_chip = platform() == "tpu" and jnp.dtype(dtype) == jnp.bfloat16
        return on_chip and kernels.fits(tokens, self.heads // parts, self.width // parts)

    def fuses_products(self, x: Array) -> bool:
        """Return whether `models.block_kernels` compute the products of a block over `x` (b, n, d)."""
        on = device()
        if on is None or platform() != "tpu" or x.dtype != jnp.bfloat16 or shards_of("mlp") * shards_of("heads") > 1:
            return False
        rows = x.shape[0] * x.shape[1] // shards_of("batch")
        return block_kernels.fits(on.device_kind, rows, self.width, self.hidden, on.num_cores)

    def block_flops(self, tokens: float, *, one: bool = False) -> float:
        """Return the FLOPs of a sequence in all blocks: four projections, two products of attention, and the MLP.

        With `one` the last unrolled block computes one token, from the keys and values of all tokens.
        """
        keys_values = 4 * self.width**2
        rest = 2 * self.width * (2 * self.width + 2 * self.hidden) + 4 * tokens * self.width
        other_tokens = (self.depth - 1) * tokens + 1 if one and not self.scan else self.depth * tokens
        return self.depth * tokens * keys_values + other_tokens * rest

    @property
    def num_layers(self) -> int:
        """Number of layers: the blocks, one layer before and one after them (BEiT, arXiv 2106.08254)."""
        return self.depth + 2

    def layer_of(self, path: tuple[str, ...]) -> int | np.ndarray:
        """Return the layer of a parameter: 0 before the blocks, i + 1 in block i, depth + 1 after them."""
        if path[0] != "transformer":
            return 0 if path[0] in self.before else self.depth + 1
        return np.arange(1, self.depth + 1) if path[1] == "blocks" else 1 + int(path[1].removeprefix("block_"))

    def unrolled(self) -> Self:
        return dataclasses.replace(self, scan=False, remat="none")

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Stack or unstack blocks according to `scan`."""
        blocks = params["transformer"]
        depth = len(jax.tree.leaves(blocks["blocks"])[0]) if "blocks" in blocks else len(blocks)
        if depth != self.depth:
            raise UserError(f"transformer has {depth} blocks, expected {self.depth}")
        if ("blocks" in blocks) != self.scan:
            blocks = stack_blocks(blocks, depth) if self.scan else unstack_blocks(blocks, depth)
        return {**params, "transformer": blocks}, []


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), (b, n, d) -> (b, n, d); returns a pair for `nn.scan`.

    `keep` (b, 2) multiplies the two branches per sample. With `at` (b,) only these tokens are computed, (b, 1, d).
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
        # CLIP's initialisation: the last maps of residual branches shrink with depth.
        out_std = config.width**-0.5 * (2 * config.depth) ** -0.5
        attention = Attention(config.heads, out_std, self.causal, self.dtype, self.fused, name="attention")
        mlp = Mlp(config.hidden, out_std, config.details.act, self.dtype, name="mlp")
        x = constrain(x, "batch", None, None)
        if self.fused and keep is None and not self.is_initializing() and config.fuses_products(x):
            x = _by_kernels(self.variables["params"], x, config, self.causal, self.fused)
            return constrain(x, "batch", None, None), None
        y = attention(LayerNorm(config.details.eps, self.dtype, name="norm_1")(x), at)
        x = (x if at is None else token_at(x, at)) + kept(y, 0)
        x = x + kept(mlp(LayerNorm(config.details.eps, self.dtype, name="norm_2")(x)), 1)
        return constrain(x, "batch", None, None), None


def _by_kernels(params: Params, x: Array, config: TransformerConfig, causal: bool, tokens: int) -> Array:
    """Compute a block with these parameters by kernels; see `Block`, and `kernels.attention` for `tokens`."""
    width, eps, act = config.width, config.details.eps, ACTIVATIONS[config.details.act]
    on: Any = device()  # a TPU, see `fuses_products`

    def linear(part: Params) -> tuple[Array, Array]:
        kernel = part["kernel"].astype(x.dtype)
        return kernel.reshape(-1, kernel.shape[-1]), part["bias"][None]

    def norm(part: Params) -> block_kernels.Norm:
        return block_kernels.Norm(part["norm"]["scale"][None], part["norm"]["bias"][None])

    attention, mlp = params["attention"], params["mlp"]
    heads = kernels.group_heads(attention["qkv"]["kernel"].astype(x.dtype))
    bias = kernels.group_heads(attention["qkv"]["bias"])[None]
    rest = block_kernels.Weights(
        *linear(attention["out"]), *norm(params["norm_2"]), *linear(mlp["up"]), *linear(mlp["down"])
    )

    def on_device(x: Array, norm: block_kernels.Norm, heads: Array, bias: Array, rest: block_kernels.Weights) -> Array:
        qkv, rows = block_kernels.project(x.reshape(-1, width), norm, heads, eps, on.num_cores)
        qkv = qkv.reshape(*x.shape[:2], -1)
        attended = kernels.attention(qkv, bias, width // config.heads, tokens, causal).reshape(-1, width)
        return block_kernels.finish(rows, attended, rest, act, eps, on.num_cores).reshape(x.shape)

    axes = ("batch", None, None)
    return map_devices(on_device, (x, norm(params["norm_1"]), heads, bias, rest), (axes, (), (), (), ()), axes)


class Transformer(nn.Module):
    """The blocks of `config`, (b, n, d) -> (b, n, d), or (b, 1, d) if only the tokens `at` (b,) are read.

    `config.scan` stacks the blocks' parameters and compiles one block, which costs about 25 % on a CPU. On TPUs all
    blocks are compiled anyway, because copying activations to and from a loop's stacks takes a quarter of a step. The
    last unrolled block computes only the tokens `at`.

    Stochastic depth (arXiv 1603.09382) with uniform `noise` (b, depth, 2) leaves out branches in a training pass, with
    a probability rising from 0 in the first block to `drop_path` in the last; the kept branches are scaled up. The
    noise is an input with one row per sample, so that microbatches leave out the same branches.
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
            x = jnp.pad(x, ((0, 0), (0, -tokens % kernels.SUBLANES), (0, 0)))
        args = (self.config, self.causal, self.dtype)
        if scan and platform() == "tpu":
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
            if last is not None:  # a single query takes no kernel, and must not attend to padding
                x, fused_tokens = x[:, :tokens], 0
            x, _ = block(*args, fused_tokens, name=f"block_{i}")(x, None if keep is None else keep[i], last)
        return x[:, :tokens]

    def _unrolled(self, x: Array, keep: Array | None, fused_tokens: int) -> Array:
        """Apply blocks with stacked parameters one by one."""
        depth, remat = self.config.depth, self.config.remat

        def apply(params: Params, x: Array, keep: Array | None) -> Any:
            block = Block(self.config, self.causal, self.dtype, fused_tokens, parent=None)
            return block.apply({"params": flax.traverse_util.unflatten_dict(params)}, x, keep)[0]

        block = apply if remat == "none" else jax.checkpoint(apply, policy=REMAT_POLICIES[remat])
        stacks = flax.traverse_util.flatten_dict(self.variables["params"]["blocks"])
        # Casting kernels before the split makes devices sum and join their gradients in `dtype`.
        matrices = [path for path in stacks if path[-1] == "kernel"]
        stacks |= {path: stacks[path].astype(self.dtype) for path in matrices}
        # The gradient of one split is one concatenation; the gradient of slices would be a sum of padded arrays.
        splits = {path: jax.lax.split(stack, (1,) * depth) for path, stack in stacks.items()}
        blocks = [{path: split[i][0] for path, split in splits.items()} for i in range(depth)]
        for i in range(depth):
            with jax.named_scope(f"block_{i}"):
                if i + 1 < depth:
                    # While this block computes its gradients, devices sum the gradients of the next block.
                    x, later = compiler.ordered(x, {path: blocks[i + 1][path] for path in matrices})
                    blocks[i + 1] |= later
                x = block(blocks[i], x, None if keep is None else keep[i])
        return x


def stack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Convert unrolled parameters of a `Transformer` to the scanned layout, with a leading axis of size `depth`."""
    blocks = [params[f"block_{i}"] for i in range(depth)]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """Invert `stack_blocks`."""
    return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)}


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TransformerConfig, TextTower):
    """Config group `model.txt`; see `TextTransformer`. The vocabulary is the tokenizer's."""

    meaning_keys: ClassVar[tuple[str, ...]] = ("style", "causal", "pool")
    before: ClassVar[tuple[str, ...]] = ("tokens", "positions")

    context_length: int = key(77, "tokens of a text, with its start and end", at_least(2))
    causal: bool = key(True, "a token only attends to itself and earlier tokens; padding counts as tokens")
    pool: str = key("eot", "first end-of-text token, or the last token, padding included", choice(TEXT_POOLS))

    def module(self, vocab: int, eot_id: int, dtype: DTypeLike) -> nn.Module:
        return TextTransformer(self, vocab, eot_id, dtype)

    def flops(self, train: bool) -> float:
        return self.block_flops(self.context_length, one=True)

    @property
    def cuttable(self) -> bool:
        return self.causal and self.pool == "eot"

    def cut_flops(self, tokens: int) -> float:
        return self.block_flops(tokens, one=True)

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Stack or unstack blocks, and cut positions to the context length."""
        params, notes = super().convert(params)
        n = len(params["positions"])
        if n <= self.context_length:
            return params, notes
        positions = params["positions"][: self.context_length]
        return {**params, "positions": positions}, [*notes, f"text positions cut from {n} to {self.context_length}"]

    def describe(self) -> str:
        return f"transformer of width {self.width}, depth {self.depth}, {self.context_length} tokens"


class TextTransformer(nn.Module):
    """int32 tokens (b, n) -> h_txt (b, d), the final state of the first `eot_id` (pool "eot") or of the last token.

    CLIP's attention is causal, so padding after the end-of-text token does not influence the feature. SigLIP reads the
    last token without a causal mask: texts are padded to one length, and padding is part of the input.
    """

    config: TextTowerConfig
    vocab: int
    eot_id: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, text: Array) -> Array:
        width, length = self.config.width, self.config.context_length
        if text.shape[1] > length:
            raise ValueError(f"expected at most {length} tokens, got {text.shape[1]}")
        tokens = self.param("tokens", named(nn.initializers.normal(0.02), "vocab", "table"), (self.vocab, width))
        positions = self.param("positions", named(nn.initializers.normal(0.01), None, "table"), (length, width))
        x = (tokens[text] + positions[: text.shape[1]]).astype(self.dtype)  # (b, n, d)
        if self.config.pool == "last":
            at = jnp.broadcast_to(text.shape[1] - 1, text.shape[:1])
        else:
            at = jnp.argmax(text == self.eot_id, axis=1)  # (b,)
        x = Transformer(self.config, causal=self.config.causal, dtype=self.dtype, name="transformer")(x, at=at)
        x = token_at(x, at) if self.config.scan else x  # (b, 1, d)
        return LayerNorm(self.config.details.eps, self.dtype, name="norm_post")(x[:, 0])
