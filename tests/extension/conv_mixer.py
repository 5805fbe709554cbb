"""An image tower of somebody else's: ConvMixer (arXiv 2201.09792), with LayerNorm and stochastic depth."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xclip_jax.core.fields import at_least, fraction_below_one, key
from xclip_jax.models.tower import ImageTower

KERNEL = 5


@dataclasses.dataclass(frozen=True)
class ConvMixer(ImageTower):
    """Config keys of the tower, and what the rest of the system asks it."""

    image_size: int = key(64, "side of the square image, pixels", at_least(1))
    patch: int = key(8, "side of a patch, pixels; it divides image_size", at_least(1))
    width: int = key(256, "channels", at_least(1))
    depth: int = key(8, "blocks", at_least(1))
    drop_path: float = key(0.0, "probability that training leaves out a block", fraction_below_one())

    def conflicts(self):
        """Values that do not go together."""
        if self.image_size % self.patch:
            yield f"image_size {self.image_size} must be a multiple of patch {self.patch}"

    def module(self, dtype):
        """See `ConvMixerModule`."""
        return ConvMixerModule(self, dtype)

    def flops(self, train):
        """Those of the patches, and of two convolutions a block."""
        block = KERNEL**2 * self.width + self.width**2
        return 2.0 * (self.image_size // self.patch) ** 2 * (3 * self.patch**2 * self.width + self.depth * block)

    def sample_noise(self, random_key, b):
        """Which blocks of an item are left out."""
        return {"paths": jax.random.uniform(jax.random.fold_in(random_key, 8), (b, self.depth))}


class ConvMixerModule(nn.Module):
    """Normalised pixels (b, h, w, 3) -> h_img (b, width)."""

    config: ConvMixer
    dtype: Any

    @nn.compact
    def __call__(self, image, paths=None):
        config, patch = self.config, (self.config.patch, self.config.patch)
        x = nn.Conv(config.width, patch, patch, "VALID", dtype=self.dtype)(image)
        for i in range(config.depth):
            y = nn.Conv(config.width, (KERNEL, KERNEL), feature_group_count=config.width, dtype=self.dtype)(x)
            y = nn.Conv(config.width, (1, 1), dtype=self.dtype)(nn.gelu(nn.LayerNorm(dtype=self.dtype)(y)))
            if paths is not None:  # what stays counts for more: the mean is that of evaluation, which leaves out none
                y = y * (paths[:, i] >= config.drop_path)[:, None, None, None] / (1 - config.drop_path)
            x = x + y
        return x.mean(axis=(1, 2), dtype=jnp.float32).astype(self.dtype)
