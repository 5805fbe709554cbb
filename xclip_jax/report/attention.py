"""Where the image tower looks: attention over patches of some images, as the tower itself computes it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from xclip_jax.data.transforms import normalize
from xclip_jax.models.two_towers import TwoTowers, Variables
from xclip_jax.parallel.mesh import replicated

IMAGES = 9  # that maps are drawn of


@dataclasses.dataclass(frozen=True)
class Maps:
    """Attention over the patches of images, each map with sum 1.

    Attributes:
      indices: of the images in the gallery.
      last: (n, rows, columns) of the last attention before the features.
      rollout: (n, rows, columns) through all blocks (arXiv 2005.00928): the blocks' maps, half of each kept for the
        residual path, multiplied.
      meaning: what `last` is, in words.
    """

    indices: list[int]
    last: np.ndarray
    rollout: np.ndarray
    meaning: str


def attention(
    model: TwoTowers,
    variables: Variables,
    gallery: Sequence[np.ndarray],
    statistics: tuple[tuple[float, ...], ...],
    mesh: jax.sharding.Mesh,
    *,
    n: int = IMAGES,
    seed: int = 0,
) -> Maps | None:
    """Maps of `n` images of `gallery`, uint8 (size, size, 3), drawn by the seed; None where the tower has none.

    Args:
      model, variables: the towers and what their `apply` takes.
      gallery: images to draw from, one or more.
      statistics: mean and deviation of pixels.
      mesh: where the parameters are.
      n, seed: how many images, and which.
    """
    if not model.img.attention:
        return None
    indices = np.random.default_rng(seed).permutation(len(gallery))[:n]
    images = np.stack([gallery[i] for i in indices])

    def maps(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.img.attention_maps(params, normalize(images, *statistics), model.dtype)

    last, rollout = jax.jit(maps, out_shardings=replicated(mesh))(variables["params"]["img"], images)
    return Maps(indices.tolist(), np.asarray(last), np.asarray(rollout), model.img.attention)
