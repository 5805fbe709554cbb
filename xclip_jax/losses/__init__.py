"""Losses of image-text pairs: pure functions, defined on the global batch.

A batch sharded over a mesh gives the value and the gradient of one device, under `jax.jit` on automatic or explicit
axes. Inside `jax.shard_map` each device has only its rows, and an average of losses of these rows is another loss.
Gather them first, and average over the axis, so that each device contributes its share of the gradient:

    z_img, z_txt = jax.lax.all_gather((z_img, z_txt), "data", tiled=True)
    loss, metrics = jax.lax.pmean(losses.clip(z_img, z_txt, scale), "data")
"""

from xclip_jax.losses.contrastive import clip, siglip
from xclip_jax.losses.noncontrastive import nclip

__all__ = ["clip", "nclip", "siglip"]
