"""The image tower: a Vision Transformer (arXiv 2010.11929) with CLIP's options."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.config.fields import above, at_least, choice, fraction_below_one, key
from xclip_jax.errors import UserError
from xclip_jax.models.layers import (
    ACTIVATIONS,
    REMAT_POLICIES,
    LayerNorm,
    Mlp,
    Transformer,
    attend,
    dense,
    named,
    tower_conflicts,
)

Array = jax.Array
POOLS = ("cls", "mean", "map")
STEMS = ("linear", "hmlp")


def stem_stages(stem: str, patch: int, width: int) -> list[tuple[int, int]]:
    """What makes a token of a patch of `patch` x `patch` pixels: (side, features) of each linear map, in order.

    A map takes side x side neighbours, pixels at first, and makes one vector of them. "linear" is one map; "hmlp"
    begins with 4 x 4 pixels and joins by the prime factors of what is left.
    """
    sides = [patch]
    if stem == "hmlp":
        sides, left = [4], patch // 4
        while left > 1:
            sides.append(next(f for f in range(2, left + 1) if left % f == 0))
            left //= sides[-1]
    return [(side, width if i == len(sides) else width // 4) for i, side in enumerate(sides, 1)]


def _join(x: Array, side: int) -> Array:
    """Puts the vectors of side x side neighbours into one. (b, h, w, c) -> (b, h / side, w / side, side * side * c)."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=side, q=side)


class HierarchicalStem(nn.Module):
    """The hierarchical MLP of arXiv 2203.09795 ("hMLP"): a patch's vector in the stages of `stem_stages`.

    LayerNorm and the activation are between stages; the paper's last norm is the tower's `pre_norm`. Patches never see
    each other. (b, h, w, 3) -> (b, h / patch, w / patch, width).
    """

    patch: int
    width: int
    act: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, (side, features) in enumerate(stem_stages("hmlp", self.patch, self.width)):
            if i:
                x = ACTIVATIONS[self.act](LayerNorm(self.eps, self.dtype, name=f"norm_{i}")(x))
            x = _join(x, side)
            std = x.shape[-1] ** -0.5
            x = dense(features, ("patch", "embed"), std=std, dtype=self.dtype, use_bias=False, name=f"linear_{i}")(x)
        return x


class AttentionPool(nn.Module):
    """One learned query attends to all tokens, then a residual MLP (big_vision's "map" head). (b, n, d) -> (b, d)."""

    heads: int
    mlp_ratio: float
    act: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, _, d = x.shape
        std, kv = d**-0.5, d // self.heads
        probe = self.param("probe", named(nn.initializers.normal(std), None, None, "table"), (1, 1, d))
        probe = jnp.broadcast_to(probe, (b, 1, d)).astype(self.dtype)
        axes = ("embed", "heads", "kv")
        query = dense((self.heads, kv), axes, std=std, dtype=self.dtype, name="query")(probe)
        key_value = dense((2, self.heads, kv), ("embed", None, *axes[1:]), std=std, dtype=self.dtype, name="kv")(x)
        key, value = einops.rearrange(key_value, "b n c heads kv -> c b heads n kv")
        y = attend(einops.rearrange(query, "b n heads kv -> b heads n kv"), key, value)
        y = einops.rearrange(y, "b heads n kv -> b n heads kv")
        y = dense(d, ("heads", "kv", "embed"), std=std, dtype=self.dtype, axis=(-2, -1), name="out")(y)
        mlp = Mlp(int(self.mlp_ratio * d), std, self.act, self.dtype, name="mlp")
        return (y + mlp(LayerNorm(self.eps, self.dtype, name="norm")(y)))[:, 0]


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig:
    """Config group `model.img`; see `VisionTransformer`."""

    image_size: int = key(224, "side of the square image, pixels; a multiple of patch", at_least(1))
    patch: int = key(16, "side of a patch, pixels", at_least(1))
    width: int = key(768, "channels of a token", at_least(1))
    depth: int = key(12, "blocks", at_least(1))
    heads: int = key(12, "attention heads; they divide width", at_least(1))
    mlp_ratio: float = key(4.0, "hidden width of the MLP over width", above(0))
    act: str = key("gelu", "activation of the MLP", choice(ACTIVATIONS))
    eps: float = key(1e-5, "added to the variance in LayerNorm", above(0))
    scan: bool = key(True, "one compiled block for all of them, with stacked parameters")
    remat: str = key("none", "what the backward pass computes again in place of keeping it", choice(REMAT_POLICIES))
    stem: str = key("linear", "patches to tokens: one linear map, or a hierarchical MLP", choice(STEMS))
    pool: str = key("cls", "class token, mean over patches, or attention pooling", choice(POOLS))
    pre_norm: bool = key(True, "LayerNorm before the first block")
    patch_dropout: float = key(0.0, "share of patches left out of a training pass", fraction_below_one())
    drop_path: float = key(0.0, "probability that training leaves out a branch of the last block", fraction_below_one())

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.image_size % self.patch:
            yield f"image_size {self.image_size} must be a multiple of patch {self.patch}"
        if self.stem == "hmlp" and (self.patch % 4 or self.width % 4):
            yield (
                f"stem 'hmlp' needs multiples of 4, and patch is {self.patch}, width {self.width}; change them, or set "
                "stem to 'linear'"
            )
        yield from tower_conflicts(self.width, self.heads, self.mlp_ratio)


class VisionTransformer(nn.Module):
    """(b, h, w, 3) normalised pixels -> h_img (b, d), the feature that CLIP projects.

    `noise` (b, patches) says which patches a training pass keeps where there is patch dropout: those with the smallest
    values. It comes from outside, one row a sample, so that an image loses the same patches in whatever part of the
    batch it is encoded; without it all patches are kept. `paths` is the same of `drop_path`, see `Transformer`.

    Attributes:
      image_size: side of the square input, pixels; a multiple of `patch`.
      patch: side of a patch, pixels.
      stem: "linear" (CLIP's one map of a patch's pixels) or "hmlp", see `HierarchicalStem`; it wants a patch that is a
        multiple of 4 and a width that is one.
      pool: "cls" (class token), "mean" (over patches) or "map" (attention pooling); only "cls" adds a token.
      pre_norm: LayerNorm before the first block, as CLIP has it.
      drop_path: probability with which a training pass leaves out a branch of the last block, see `Transformer`.
      patch_dropout: share of patches left out of a training pass (FLIP, arXiv 2212.00794); the class token stays.
    """

    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    stem: str = "linear"
    pool: str = "cls"
    pre_norm: bool = True
    act: str = "gelu"
    eps: float = 1e-5
    patch_dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array, noise: Array | None = None, paths: Array | None = None) -> Array:
        self._check(image)
        x, std = image.astype(self.dtype), self.width**-0.5
        if self.stem == "hmlp":
            x = HierarchicalStem(self.patch, self.width, self.act, self.eps, self.dtype, name="patches")(x)
        else:
            # A strided convolution is the same map; reshape and matmul is faster on CPUs and no slower on TPUs.
            x = _join(x, self.patch)
            std_in = x.shape[-1] ** -0.5
            x = dense(self.width, ("patch", "embed"), std=std_in, dtype=self.dtype, use_bias=False, name="patches")(x)
        x = einops.rearrange(x, "b h w d -> b (h w) d")
        tokens = x.shape[1] + (self.pool == "cls")
        positions = self.param("positions", named(nn.initializers.normal(std), None, "table"), (tokens, self.width))
        positions = positions.astype(self.dtype)
        x = x + positions[tokens - x.shape[1] :]
        x = self._drop_patches(x, noise)
        if self.pool == "cls":
            cls = self.param("cls", named(nn.initializers.normal(std), "table"), (self.width,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls + positions[0], (x.shape[0], 1, self.width)), x], axis=1)
        if self.pre_norm:
            x = LayerNorm(self.eps, self.dtype, name="norm_pre")(x)
        x = Transformer(
            self.depth,
            self.heads,
            self.mlp_ratio,
            False,
            self.act,
            self.eps,
            self.scan,
            self.remat,
            self.dtype,
            self.drop_path,
            self.pool == "cls",
            name="transformer",
        )(x, paths)  # (b, n, d)
        if self.pool == "cls":
            x = x[:, :1]  # LayerNorm is per token: only the class token needs it
        x = LayerNorm(self.eps, self.dtype, name="norm_post")(x)
        if self.pool == "map":
            return AttentionPool(self.heads, self.mlp_ratio, self.act, self.eps, self.dtype, name="pool_map")(x)
        return x.mean(axis=1, dtype=jnp.float32).astype(self.dtype)  # one token for "cls"

    def _check(self, image: Array) -> None:
        if image.shape[1:] != (self.image_size, self.image_size, 3):
            raise UserError(
                f"expected images of {self.image_size} x {self.image_size} pixels, got shape {image.shape}; set "
                "model.img.image_size."
            )

    def _drop_patches(self, x: Array, noise: Array | None) -> Array:
        if noise is None or self.patch_dropout == 0:
            return x
        keep = max(1, round(x.shape[1] * (1 - self.patch_dropout)))
        order = jnp.argsort(noise, axis=1)[:, :keep]
        return jnp.take_along_axis(x, order[..., None], axis=1)
