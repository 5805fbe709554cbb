"""Attention over patches from the queries and keys of a Vision Transformer, as its modules computed them."""

from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

MEANINGS = {
    "cls": "how much the class token, from which the image's features are read, attends to each patch in the last "
    "block, mean over heads",
    "mean": "how much all patches, whose mean is the image's features, attend to each patch in the last block, mean "
    "over heads",
    "map": "how much the query of the pooling head attends to each patch, mean over heads",
}


def is_captured(module: nn.Module, _: str) -> bool:
    """Whether `maps` needs the output of a module: the filter of flax's `capture_intermediates`."""
    return module.name in ("qkv", "query", "kv")


def weights(query: Array, key: Array) -> Array:
    """Softmax of scaled products, mean over heads: (b, heads, n, kv), (b, heads, m, kv) -> fp32 (b, n, m)."""
    query, key = query.astype(jnp.float32) * query.shape[-1] ** -0.5, key.astype(jnp.float32)
    return jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", query, key)).mean(axis=1)


def maps(captured: Mapping[str, Any], depth: int, pool: str) -> tuple[Array, Array]:
    """Attention of the last block, and rollout through all blocks (arXiv 2005.00928).

    Rollout multiplies the blocks' maps, half of each kept for the residual path.

    Args:
      captured: intermediates of a tower with unrolled blocks.
      depth: blocks.
      pool: how the features are read, "cls", "mean" or "map".

    Returns:
      Twice fp32 (b, patches) with rows that sum to 1.
    """
    blocks = []
    for i in range(depth):
        query, key, _ = captured["transformer"][f"block_{i}"]["attention"]["qkv"]["__call__"][0]
        blocks.append(weights(query, key))
    through = jnp.eye(blocks[0].shape[2])[None]
    for block in blocks:  # the last may have the class token's row alone
        through = (block + jnp.eye(block.shape[1], block.shape[2])) / 2 @ through
    if pool == "map":
        head = captured["pool_map"]
        key, _ = head["kv"]["__call__"][0]
        query = einops.rearrange(head["query"]["__call__"][0], "b n heads kv -> b heads n kv")
        last = weights(query, key)[:, 0]
        return last, jnp.einsum("bn,bnm->bm", last, through)
    if pool == "mean":
        return blocks[-1].mean(axis=1), through.mean(axis=1)
    # Less what the class token keeps for itself.
    last, rollout = (x[:, 0, 1:] for x in (blocks[-1], through))
    return last / last.sum(axis=1, keepdims=True), rollout / rollout.sum(axis=1, keepdims=True)
