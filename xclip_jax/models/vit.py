"""The image tower: a Vision Transformer (arXiv 2010.11929) with CLIP's options."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from xclip_jax.core.fields import at_least, choice, fraction_below_one, key
from xclip_jax.models.layers import ACTIVATIONS, HeadProjections, LayerNorm, Mlp, Style, attend, dense, named
from xclip_jax.models.tower import ImageTower, Params
from xclip_jax.models.transformer import Transformer, TransformerConfig

Array = jax.Array
POOLS = ("cls", "mean", "map")
STEMS = ("linear", "hmlp")


def stem_stages(stem: str, patch: int, width: int) -> list[tuple[int, int]]:
    """Return (side, features) of each linear map from `patch` x `patch` pixels to a token, in order.

    A map joins side x side neighbours, at first pixels, to one vector. "linear" is one map; "hmlp" starts with 4 x 4
    pixels and continues with the prime factors of the remaining side.
    """
    sides = [patch]
    if stem == "hmlp":
        sides = [4]
        remaining = patch // 4
        while remaining > 1:
            sides.append(next(f for f in range(2, remaining + 1) if remaining % f == 0))
            remaining //= sides[-1]
    return [(side, width if i == len(sides) else width // 4) for i, side in enumerate(sides, 1)]


def _join(x: Array, side: int) -> Array:
    """Join the vectors of side x side neighbours, (b, h, w, c) -> (b, h / side, w / side, side * side * c)."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=side, q=side)


class HierarchicalStem(nn.Module):
    """The hierarchical MLP of arXiv 2203.09795 ("hMLP"), (b, h, w, 3) -> (b, h / patch, w / patch, width).

    LayerNorm and the activation separate the stages of `stem_stages`; the paper's last norm is the style's `pre_norm`.
    """

    patch: int
    width: int
    style: Style
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (side, features) in enumerate(stem_stages("hmlp", self.patch, self.width)):
            if i:
                x = ACTIVATIONS[self.style.act](LayerNorm(self.style.eps, self.dtype, name=f"norm_{i}")(x))
            x = _join(x, side)
            std = x.shape[-1] ** -0.5
            x = dense(features, ("patch", "embed"), std=std, dtype=self.dtype, use_bias=False, name=f"linear_{i}")(x)
        return x


class AttentionPool(nn.Module):
    """A learned query over all tokens, then a residual MLP (big_vision's "map" head), (b, n, d) -> (b, d)."""

    config: TransformerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, _, d = x.shape
        heads = self.config.heads
        std = d**-0.5
        kv = d // heads
        probe = self.param("probe", named(nn.initializers.normal(std), None, None, "table"), (1, 1, d))
        probe = jnp.broadcast_to(probe, (b, 1, d)).astype(self.dtype)
        query = dense((heads, kv), ("embed", "heads", "kv"), std=std, dtype=self.dtype, name="query")(probe)
        key, value = HeadProjections(2, heads, self.dtype, name="kv")(x)
        y = attend(einops.rearrange(query, "b n heads kv -> b heads n kv"), key, value)
        y = einops.rearrange(y, "b heads n kv -> b n heads kv")
        y = dense(d, ("heads", "kv", "embed"), std=std, dtype=self.dtype, axis=(-2, -1), name="out")(y)
        mlp = Mlp(self.config.hidden, std, self.config.details.act, self.dtype, name="mlp")
        return (y + mlp(LayerNorm(self.config.details.eps, self.dtype, name="norm")(y)))[:, 0]


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig(TransformerConfig, ImageTower):
    """Config group `model.img`; see `VisionTransformer`."""

    meaning_keys: ClassVar[tuple[str, ...]] = ("style", "pool")
    before: ClassVar[tuple[str, ...]] = ("patches", "positions", "cls", "norm_pre")

    image_size: int = key(224, "side of the image, pixels; a multiple of patch unless pool is 'map'", at_least(1))
    patch: int = key(16, "side of a patch, pixels", at_least(1))
    width: int = key(768, "channels of a token", at_least(1))
    heads: int = key(12, "attention heads; they divide width", at_least(1))
    stem: str = key("linear", "patches to tokens: one linear map, or a hierarchical MLP", choice(STEMS))
    pool: str = key("cls", "class token, mean over patches, or attention pooling", choice(POOLS))
    patch_dropout: float = key(0.0, "fraction of patches dropped in training", fraction_below_one(), card="model")
    drop_path: float = key(0.0, "probability that training leaves out a branch of the last block", fraction_below_one())

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        # Published SigLIPs split 384 pixels into patches of 14 and ignore the border; elsewhere it is likely a mistake.
        if self.image_size % self.patch and (self.pool != "map" or not self.grid):
            sides = [side for side in (self.grid * self.patch, (self.grid + 1) * self.patch) if side]
            nearest = f"set it to {' or '.join(map(str, sides))}"
            yield f"image_size {self.image_size} must be a multiple of patch {self.patch}; {nearest}"
        if self.stem == "hmlp" and (self.patch % 4 or self.width % 4):
            yield f"stem 'hmlp' needs multiples of 4, but patch is {self.patch} and width {self.width}"
        yield from super().conflicts()

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    def module(self, dtype: DTypeLike) -> nn.Module:
        return VisionTransformer(self, dtype)

    def kept(self, patches: int) -> int:
        """Return how many of `patches` a training pass keeps."""
        return max(1, round(patches * (1 - self.patch_dropout)))

    def flops(self, train: bool) -> float:
        """Return the FLOPs of stem, blocks and pooling, in training without the dropped patches."""
        kept = self.kept(self.grid**2) if train else self.grid**2
        embedding = 0
        side = self.grid * self.patch
        channels = 3
        for joined, features in stem_stages(self.stem, self.patch, self.width):
            side //= joined
            embedding += 2 * side**2 * joined**2 * channels * features
            channels = features
        pooled = 0.0
        if self.pool == "map":  # keys and values for one query, and a residual MLP of one token
            pooled = 4 * kept * self.width**2 + (4 + 4 * self.mlp_ratio) * self.width**2 + 4 * kept * self.width
        cls = self.pool == "cls"
        return embedding + self.block_flops(kept + cls, one=cls) + pooled

    def sample_noise(self, random_key: Array, b: int) -> dict[str, Array]:
        """Return uniform "patches" (b, patches) for patch dropout and "paths" (b, depth, 2) for stochastic depth."""
        noise = {}
        if self.patch_dropout:
            noise["patches"] = jax.random.uniform(jax.random.fold_in(random_key, 4), (b, self.grid**2))
        if self.drop_path:
            noise["paths"] = jax.random.uniform(jax.random.fold_in(random_key, 2), (b, self.depth, 2))
        return noise

    def convert(self, params: Params) -> tuple[Params, list[str]]:
        """Stack or unstack blocks, and interpolate positions to the image size."""
        params, notes = super().convert(params)
        extra = int(self.pool == "cls")  # the class token's row comes first
        table = params["positions"]
        grid = math.isqrt(len(table) - extra)
        if grid == self.grid or grid**2 != len(table) - extra:
            return params, notes
        square = table[extra:].reshape(grid, grid, -1)
        shape = (self.grid, self.grid, square.shape[-1])
        square = np.asarray(
            jax.image.resize(square, shape, "cubic", antialias=True)
        )  # antialiasing matters for smaller grids
        table = np.concatenate([table[:extra], square.reshape(self.grid**2, -1)])
        note = f"image positions interpolated from {grid} x {grid} to {self.grid} x {self.grid}"
        return {**params, "positions": table}, [*notes, note]

    def patch_features(self, params: Params, image: Array, dtype: DTypeLike) -> Array:
        tower: Any = VisionTransformer(self, dtype, pooled=False)
        return tower.apply({"params": params}, image)

    def describe(self) -> str:
        return f"ViT of width {self.width}, depth {self.depth}, patch {self.patch}, {self.image_size} px"


class VisionTransformer(nn.Module):
    """Normalised pixels (b, h, w, 3) -> h_img (b, d), the feature that CLIP projects.

    With patch dropout (FLIP, arXiv 2212.00794) a training pass keeps the class token and the patches with the smallest
    `patches` (b, patches). This noise is an input with one row per sample, so that microbatches drop the same patches;
    without it all patches are kept. `paths` (b, depth, 2) is the noise of `Transformer` for `drop_path`.

    If not `pooled`, return the features of all patches (b, grid, grid, d) after the last block and `norm_post`, like
    timm's `forward_features`. CLIP trains `norm_post` on the class token.
    """

    config: ImageTowerConfig
    dtype: DTypeLike = jnp.float32
    pooled: bool = True

    @nn.compact
    def __call__(self, image: Array, patches: Array | None = None, paths: Array | None = None) -> Array:
        size = self.config.image_size
        if image.shape[1:] != (size, size, 3):
            raise ValueError(f"expected images of {size} x {size} pixels, got shape {image.shape}")
        config = self.config
        style = config.details
        side = config.grid * config.patch
        x = image[:, :side, :side].astype(self.dtype)  # without a remainder at the right and the bottom
        std = config.width**-0.5
        if config.stem == "hmlp":
            x = HierarchicalStem(config.patch, config.width, style, self.dtype, name="patches")(x)
        else:
            # Reshape and matmul equal a strided convolution, faster on CPUs and as fast on TPUs.
            x = _join(x, config.patch)
            options: dict[str, Any] = {"std": x.shape[-1] ** -0.5, "dtype": self.dtype, "use_bias": style.patch_bias}
            x = dense(config.width, ("patch", "embed"), **options, name="patches")(x)
        x = einops.rearrange(x, "b h w d -> b (h w) d")
        first = config.pool == "cls"
        tokens = x.shape[1] + first
        positions = self.param("positions", named(nn.initializers.normal(std), None, "table"), (tokens, config.width))
        positions = positions.astype(self.dtype)
        x = x + positions[tokens - x.shape[1] :]
        if patches is not None and config.patch_dropout:
            order = jnp.argsort(patches, axis=1)[:, : config.kept(x.shape[1])]
            x = jnp.take_along_axis(x, order[..., None], axis=1)
        if first:
            cls = self.param("cls", named(nn.initializers.normal(std), "table"), (config.width,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls + positions[0], (x.shape[0], 1, config.width)), x], axis=1)
        if style.pre_norm:
            x = LayerNorm(style.eps, self.dtype, name="norm_pre")(x)
        at = jnp.zeros(len(x), jnp.int32) if first and self.pooled else None
        x = Transformer(config, False, config.drop_path, self.dtype, name="transformer")(x, paths, at)  # (b, n, d)
        if not self.pooled:
            x = LayerNorm(style.eps, self.dtype, name="norm_post")(x[:, first:])
            return einops.rearrange(x, "b (h w) d -> b h w d", h=config.grid)
        if first:
            x = x[:, :1]  # LayerNorm is per token, so only the class token needs it
        x = LayerNorm(style.eps, self.dtype, name="norm_post")(x)
        if config.pool == "map":
            return AttentionPool(config, self.dtype, name="pool_map")(x)
        return x.mean(axis=1, dtype=jnp.float32).astype(self.dtype)  # one token for "cls"
