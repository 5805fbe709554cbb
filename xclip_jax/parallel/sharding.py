"""Which mesh axis each logical axis of a parameter lives on. Models name axes; only this file knows what they mean."""

from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

# Kernels of matrix products are split; embeddings over vocabulary and positions, norms and biases stay whole but for
# their feature axis. On a mesh with fsdp = model = 1 every parameter is replicated: plain data parallelism.
RULES: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),
    ("mlp", "model"),
    ("heads", "model"),
    ("cluster", "model"),
    ("kv", None),
    ("patch", None),
    ("vocab", None),
    ("layers", None),
    ("norm", None),
)


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of logically named (boxed) abstract arrays, in the tree's unboxed structure."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
