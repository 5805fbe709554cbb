"""Gradients of large batches on few chips: GradCache (arXiv 2101.06983) for every objective.

The encoders run on parts of the batch and only their features are kept; heads, with BatchNorm over the global batch,
and losses see all features at once. The backward pass runs each part's encoders again with the features' gradients.
The result is the gradient of the whole batch up to rounding. Averaging the gradients of the parts' own losses, which
looks alike, is a different, wrong objective: contrastive losses compare pairs across parts, and nCLIP's smoothness is
the entropy of a mean. No option does that.
"""

from collections.abc import Callable
from typing import Any

import jax

from xclip_jax.parallel import sharding


def value_and_grad(
    encode: Callable[[Any, Any], Any], loss: Callable[[Any, Any], tuple[jax.Array, Any]], microbatches: int
) -> Callable[[Any, Any], tuple[tuple[jax.Array, Any], Any]]:
    """`jax.value_and_grad` of loss(params, encode(params, inputs)) with regard to params; `loss` returns (value, aux).

    Args:
      encode: (params, inputs) -> features, row by row: all randomness must be in `inputs`.
      loss: sees the features of the global batch.
      microbatches: parts of the batch to encode one after the other; 1 keeps all activations.

    Returns:
      (params, inputs) -> ((value, aux), grads).
    """

    def whole(params: Any, inputs: Any) -> tuple[jax.Array, Any]:
        return loss(params, encode_microbatches(encode, params, inputs, microbatches))

    return jax.value_and_grad(whole, has_aux=True)


def encode_microbatches(encode: Callable[[Any, Any], Any], params: Any, inputs: Any, microbatches: int) -> Any:
    """encode(params, inputs), one part of the rows after the other; its derivative computes each part once more."""
    if microbatches == 1:
        return encode(params, inputs)
    return sharding.map_microbatches(encode, params, inputs, microbatches, stack=False)
