"""Low-rank adapters: fine-tuning adds the product of two thin matrices to a fixed kernel (LoRA, arXiv 2106.09685)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import at_least, key
from xclip_jax.models.tower import Params

ADAPTERS = "lora"  # name of the adapters among a model's parameters
KERNELS = ("qkv", "out", "up", "down")  # of blocks


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Config group `finetune.lora`, without LoRA's alpha: with AdamW it only scales the learning rate."""

    rank: int = key(0, "rank of the adapters in the towers, whose initial weights stay fixed; 0 for none", at_least(0))


def initial(params: Params, config: LoraConfig, random_key: jax.Array) -> Params:
    """Return initial adapters {"inputs": (..., i, rank), "outputs": (..., rank, o)} at the path of each (i, o) kernel.

    They change nothing at first: input factors are random, output factors zero. Queries, keys and values of a block
    share the input factor; stacked blocks have separate factors. `params` are the model's, by tower and head.
    `UserError` if a tower would have no adapters, or a kernel is smaller than the rank.
    """
    adapters: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for path, kernel in flatten_dict(params).items():
        if path[-1] != "kernel" or path[-2] not in KERNELS or "transformer" not in path:
            continue
        first = int("blocks" in path)
        split = first + 1 if path[-2] == "qkv" else kernel.ndim - 1  # axes before it are inputs
        stacked = kernel.shape[:first]
        rows = math.prod(kernel.shape[first:split])
        columns = math.prod(kernel.shape[split:])
        if config.rank > min(rows, columns):
            raise UserError(
                f"finetune.lora.rank is {config.rank}, above the size of the kernel {'/'.join(path[:-1])}, {rows} x "
                f"{columns}; lower it to {min(rows, columns)} or less."
            )
        random_key, factor_key = jax.random.split(random_key)
        inputs = jax.random.normal(factor_key, (*stacked, rows, config.rank)) * rows**-0.5
        adapters[path] = {"inputs": inputs, "outputs": jnp.zeros((*stacked, config.rank, columns))}
    bare = sorted({"img", "txt"} & params.keys() - {path[0] for path in adapters})
    if bare:
        raise UserError(
            f"finetune.lora.rank is {config.rank}, but the tower {bare[0]!r} has no transformer with kernels "
            f"{', '.join(KERNELS)}; set finetune.lora.rank to 0."
        )
    return unflatten_dict(adapters)


def merged(params: Params) -> Params:
    """Add the adapters to their kernels, without gradients of the kernels themselves, and drop them from the tree.

    Shapes instead of arrays, and parameters without adapters, stay unchanged.
    """
    adapters = params.get(ADAPTERS)
    params = {name: x for name, x in params.items() if name != ADAPTERS}
    if not adapters or isinstance(jax.tree.leaves(adapters)[0], jax.ShapeDtypeStruct):
        return params
    kernels = flatten_dict({name: jax.lax.stop_gradient(params[name]) for name in adapters})
    for path, factors in flatten_dict(adapters, is_leaf=lambda _, tree: "inputs" in tree).items():
        change = jnp.matmul(factors["inputs"], factors["outputs"], precision=jax.lax.Precision.HIGHEST)
        kernels[path] = kernels[path] + change.reshape(kernels[path].shape)
    return params | unflatten_dict(kernels)
