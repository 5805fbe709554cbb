"""Low-rank adapters: fine-tuning adds the product of two thin matrices to a fixed kernel (LoRA, arXiv 2106.09685)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax.core.errors import UserError
from xclip_jax.core.fields import Check, at_least, key
from xclip_jax.models.tower import Params

ADAPTERS = "lora"  # name of the adapters among a model's parameters
KERNELS = ("qkv", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Config group `finetune.lora`, without LoRA's alpha: with AdamW it only scales the learning rate."""

    rank: int = key(0, "rank of the adapters in the towers, whose initial weights stay fixed; 0 for none", at_least(0))
    targets: Sequence[str] = key(
        KERNELS, "kernels of blocks with adapters", Check(f"names among {KERNELS}", lambda x: set(x) <= {*KERNELS})
    )

    def conflicts(self) -> Iterator[str]:
        """Yield values that contradict each other."""
        if self.rank and not self.targets:
            yield f"rank is {self.rank}, and targets is empty; name kernels among {', '.join(KERNELS)}, or set it to 0"

    def too_large(self, sizes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
        """Yield a fault if the rank exceeds the smallest kernel; `sizes` are the inputs and outputs of kernels."""
        for name, size in sorted(sizes.items(), key=lambda item: min(item[1]))[:1]:
            if self.rank > min(size):
                yield (
                    f"finetune.lora.rank is {self.rank}, above the size of the kernel {name}, {size[0]} x {size[1]}; "
                    f"lower it to {min(size)} or less"
                )


def initial(params: Params, config: LoraConfig, random_key: jax.Array) -> Params:
    """Return initial adapters {"inputs": (..., i, rank), "outputs": (..., rank, o)} at the path of each (i, o) kernel.

    They change nothing at first: input factors are random, output factors zero. Queries, keys and values of a block
    share the input factor; stacked blocks have separate factors. `params` are the model's, by tower and head.

    Raises:
      UserError: a tower would have no adapters, or a kernel is smaller than the rank.
    """
    adapters: dict[tuple[str, ...], jax.Array] = {}
    for path, kernel in flatten_dict(params).items():
        if path[-1] != "kernel" or path[-2] not in config.targets or "transformer" not in path:
            continue
        first = int("blocks" in path)
        split = first + 1 if path[-2] == "qkv" else kernel.ndim - 1  # axes before it are inputs
        stacked = kernel.shape[:first]
        rows = math.prod(kernel.shape[first:split])
        columns = math.prod(kernel.shape[split:])
        for fault in config.too_large({"/".join(path[:-1]): (rows, columns)}):
            raise UserError(f"{fault}.")
        random_key, factor_key = jax.random.split(random_key)
        inputs = jax.random.normal(factor_key, (*stacked, rows, config.rank)) * rows**-0.5
        adapters |= {(*path, "inputs"): inputs, (*path, "outputs"): jnp.zeros((*stacked, config.rank, columns))}
    bare = sorted({"img", "txt"} & params.keys() - {path[0] for path in adapters})
    if bare:
        raise UserError(
            f"finetune.lora.rank is {config.rank}, but no transformer in the tower {bare[0]!r} has any of the kernels "
            f"{', '.join(config.targets)} to train; set finetune.lora.rank to 0, or name other finetune.lora.targets."
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
    factors = flatten_dict(adapters)
    for path in dict.fromkeys(path[:-1] for path in factors):  # a set's order would differ between processes
        inputs, outputs = (factors[*path, name] for name in ("inputs", "outputs"))
        change = jnp.matmul(inputs, outputs, precision=jax.lax.Precision.HIGHEST)
        kernels[path] = kernels[path] + change.reshape(kernels[path].shape)
    return params | unflatten_dict(kernels)
