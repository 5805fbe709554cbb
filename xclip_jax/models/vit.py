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
from xclip_jax.models.layers import HeadProjections, LayerNorm, Mlp, attend, dense, named
from xclip_jax.models.tower import ImageTower, Params
from xclip_jax.models.transformer import Transformer, TransformerConfig

Array = jax.Array
POOLS = ("cls", "mean", "map")


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
    pool: str = key("cls", "class token, mean over patches, or attention pooling", choice(POOLS))
    drop_path: float = key(0.0, "probability that training leaves out a branch of the last block", fraction_below_one())

    def conflicts(self) -> Iterator[str]:
        # Published SigLIPs split 384 pixels into patches of 14 and ignore the border; elsewhere it is likely a mistake.
        if self.image_size % self.patch and (self.pool != "map" or not self.grid):
            nearest = max(round(self.image_size / self.patch), 1) * self.patch
            yield f"image_size {self.image_size} must be a multiple of patch {self.patch}; set it to {nearest}"
        if self.drop_path and self.depth == 1:
            yield "drop_path leaves out no branch of the first block, and depth is 1; set it to 0"
        yield from super().conflicts()

    @property
    def grid(self) -> int:
        return self.image_size // self.patch

    def module(self, dtype: DTypeLike) -> nn.Module:
        return VisionTransformer(self, dtype)

    def flops(self, train: bool) -> float:
        """Return the FLOPs of patches, blocks and pooling."""
        patches = self.grid**2
        embedding = 2 * patches * self.patch**2 * 3 * self.width
        pooled = 0.0
        if self.pool == "map":  # keys and values for one query, and a residual MLP of one token
            pooled = 4 * patches * self.width**2 + (4 + 4 * self.mlp_ratio) * self.width**2 + 4 * patches * self.width
        cls = self.pool == "cls"
        return embedding + self.block_flops(patches + cls, one=cls) + pooled

    def sample_noise(self, random_key: Array, b: int) -> dict[str, Array]:
        """Return uniform "paths" (b, depth, 2) for stochastic depth."""
        if not self.drop_path:
            return {}
        return {"paths": jax.random.uniform(jax.random.fold_in(random_key, 2), (b, self.depth, 2))}

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
        square = np.asarray(jax.image.resize(square, shape, "cubic", antialias=True))
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

    `paths` (b, depth, 2) is the noise of `Transformer` for `drop_path`. If not `pooled`, return the features of all
    patches (b, grid, grid, d) after the last block and `norm_post`, like timm's `forward_features`. CLIP trains
    `norm_post` on the class token.
    """

    config: ImageTowerConfig
    dtype: DTypeLike = jnp.float32
    pooled: bool = True

    @nn.compact
    def __call__(self, image: Array, paths: Array | None = None) -> Array:
        size = self.config.image_size
        if image.shape[1:] != (size, size, 3):
            raise ValueError(f"expected images of {size} x {size} pixels, got shape {image.shape}")
        config = self.config
        style = config.details
        side = config.grid * config.patch
        x = image[:, :side, :side].astype(self.dtype)  # without a remainder at the right and the bottom
        # Reshape and matmul equal a strided convolution, faster on CPUs and as fast on TPUs.
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=config.patch, q=config.patch)
        options: dict[str, Any] = {"std": x.shape[-1] ** -0.5, "dtype": self.dtype, "use_bias": style.patch_bias}
        x = dense(config.width, ("patch", "embed"), **options, name="patches")(x)
        x = einops.rearrange(x, "b h w d -> b (h w) d")
        std = config.width**-0.5
        first = config.pool == "cls"
        tokens = x.shape[1] + first
        positions = self.param("positions", named(nn.initializers.normal(std), None, "table"), (tokens, config.width))
        positions = positions.astype(self.dtype)
        x = x + positions[tokens - x.shape[1] :]
        if first:
            cls = self.param("cls", named(nn.initializers.normal(std), "table"), (config.width,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls + positions[0], (x.shape[0], 1, config.width)), x], axis=1)
        if style.pre_norm:
            x = LayerNorm(style.eps, self.dtype, name="norm_pre")(x)
        at = jnp.zeros(x.shape[0], jnp.int32) if first and self.pooled else None
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
