"""Where the image tower looks: attention over patches, from the model's own weights.

The blocks' queries and keys are captured as the tower computes them (flax's `capture_intermediates`), and their softmax
is taken here: the model, and so the training step, knows nothing of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.data.transforms import normalize
from xclip_jax.models.layers import unstack_blocks
from xclip_jax.models.two_towers import TwoTowers
from xclip_jax.parallel.mesh import replicated

Array = jax.Array

IMAGES = 9  # that maps are drawn of

_LAST = {
    "cls": "how much the class token, from which the image's features are read, attends to each patch in the last "
    "block, mean over heads",
    "mean": "how much all patches, whose mean is the image's features, attend to each patch in the last block, mean "
    "over heads",
    "map": "how much the query of the pooling head attends to each patch, mean over heads",
}


@dataclasses.dataclass(frozen=True)
class Maps:
    """Attention over the patches of images, each map with sum 1.

    Attributes:
      picked: which images of the gallery.
      last: (n, rows, columns) of the last attention before the features.
      rollout: (n, rows, columns) through all blocks (arXiv 2005.00928): the blocks' maps, half of each kept for the
        residual path, multiplied.
      meaning: what `last` is, in words.
    """

    picked: list[int]
    last: np.ndarray
    rollout: np.ndarray
    meaning: str


def attention(
    model: TwoTowers,
    variables: Mapping[str, Any],
    gallery: Sequence[np.ndarray],
    statistics: tuple[tuple[float, ...], ...],
    mesh: jax.sharding.Mesh,
    *,
    n: int = IMAGES,
    seed: int = 0,
) -> Maps:
    """Maps of `n` images of `gallery`, uint8 (size, size, 3), drawn by the seed.

    Args:
      model, variables: the towers and what their `apply` takes.
      gallery: images to draw from, one or more.
      statistics: mean and deviation of pixels.
      mesh: where the parameters lie.
      n, seed: how many images, and which.
    """
    picked = np.random.default_rng(seed).permutation(len(gallery))[:n]
    images = np.stack([gallery[i] for i in picked])
    tower = {"pool": "cls"} | dict(model.img)
    params = variables["params"]
    if tower.get("scan"):
        blocks = unstack_blocks(params["img"]["transformer"], tower["depth"])
        params = {**params, "img": {**params["img"], "transformer": blocks}}
    plain = model.clone(img=tower | {"scan": False, "remat": "none"})

    def run(params: Any, images: Array) -> tuple[Array, Array]:
        _, found = plain.apply(
            {**variables, "params": params},
            normalize(images, *statistics),
            method="encode_image",
            capture_intermediates=lambda module, _: module.name in ("qkv", "query", "kv"),
            mutable=["intermediates"],
        )
        return _maps(found["intermediates"]["img"], tower["depth"], tower["pool"])

    last, rollout = jax.jit(run, out_shardings=replicated(mesh))(params, images)
    side = tower["image_size"] // tower["patch"]
    square = (np.asarray(x).reshape(len(images), side, side) for x in (last, rollout))
    return Maps(picked.tolist(), *square, _LAST[tower["pool"]])


def weights(query: Array, key: Array) -> Array:
    """Softmax of scaled products, mean over heads: (b, n, heads, kv), (b, m, heads, kv) -> fp32 (b, n, m)."""
    query, key = query.astype(jnp.float32) * query.shape[-1] ** -0.5, key.astype(jnp.float32)
    return jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", query, key)).mean(axis=1)


def _maps(found: Mapping[str, Any], depth: int, pool: str) -> tuple[Array, Array]:
    """Captured outputs -> last and rollout, each (b, patches) with rows that sum to 1."""
    blocks = []
    for i in range(depth):
        qkv = found["transformer"][f"block_{i}"]["attention"]["qkv"]["__call__"][0]
        query, key, _ = einops.rearrange(qkv, "b n c heads kv -> c b n heads kv")
        blocks.append(weights(query, key))
    through = jnp.eye(blocks[0].shape[1])[None]
    for block in blocks:
        through = (block + jnp.eye(block.shape[1])) / 2 @ through
    if pool == "map":
        head = found["pool_map"]
        key, _ = einops.rearrange(head["kv"]["__call__"][0], "b n c heads kv -> c b n heads kv")
        last = weights(head["query"]["__call__"][0], key)[:, 0]
        return last, jnp.einsum("bn,bnm->bm", last, through)
    if pool == "mean":
        return blocks[-1].mean(axis=1), through.mean(axis=1)
    last, rollout = (x[:, 0, 1:] for x in (blocks[-1], through))  # less what the class token keeps for itself
    return tuple(x / x.sum(axis=1, keepdims=True) for x in (last, rollout))
